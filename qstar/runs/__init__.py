"""The engine of all methods: run contexts and folders, rollouts, training stages, base models, evaluation."""
