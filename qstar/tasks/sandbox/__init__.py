"""The processes that run model-written code; `qstar.tasks.verify` starts them and describes what they guarantee.

Nothing here imports qstar: `server.py` is started by a bare interpreter, and its neighbours by their plain names.
"""
