import collections
import random
import zlib

import pytest

from qstar.errors import UserError
from qstar.tasks import arithmetic, make_task
from qstar.text import char_tokenizer

SPEC_RELEASE = """\
Input:
6 8 9 1 5 + 7 1 8 9 8
Target:
<scratch>
6 8 9 1 5 + 7 1 8 9 8 , C: 0
1 + 9 , 3 C: 1
9 + 8 , 1 3 C: 1
8 + 1 , 8 1 3 C: 1
6 + 7 , 0 8 1 3 C: 1
, 4 0 8 1 3 C: 1
1 4 0 8 1 3
</scratch>
1 4 0 8 1 3

"""


def problem(task, a, b):
    return task.problem(a, b)


def slow_lines(a, b):
    """The scratchpad restated with integers: what is written at place k, from sums modulo powers of ten."""
    n = len(str(a))
    lines = [(f"{a}+{b}", "", 0)]
    for k in range(1, n + 1):
        low = a % 10**k + b % 10**k
        pair = f"{a // 10**k % 10}+{b // 10**k % 10}" if k < n else ""
        lines.append((pair, str(low % 10**k).zfill(k), low // 10**k))
    return lines, str(a + b).zfill(n + 1)


def slow_compact(a, b):
    lines, padded = slow_lines(a, b)
    text = ""
    for pair, so_far, carry in lines:
        text += pair + "," + so_far + "C" + str(carry) + "|"
    return text + padded + "|#" + str(a + b)


def slow_release(a, b):
    lines, padded = slow_lines(a, b)
    text = "<scratch>\n"
    for pair, so_far, carry in lines:
        text += "".join(c + " " for c in pair + "," + so_far) + f"C: {carry}\n"
    return text + " ".join(padded) + "\n</scratch>\n" + " ".join(str(a + b))


def pairs_of_every_length():
    rng = random.Random(0)
    for n in range(1, 11):
        for _ in range(40):
            yield rng.randint(10 ** (n - 1), 10**n - 1), rng.randint(10 ** (n - 1), 10**n - 1)


@pytest.fixture(scope="module")
def compact():
    return make_task("arithmetic")


@pytest.fixture(scope="module")
def release():
    return make_task("arithmetic", format="release", shots=0)


@pytest.fixture(scope="module")
def direct():
    return make_task("arithmetic", format="direct")


def test_compact_is_the_literal_example(compact):
    p = problem(compact, 737, 361)
    assert compact.prompt(p) == "737+361="
    assert compact.prompt(p, hint=True) == "737+361=(1098)"
    assert compact.solution(p) == "737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098"
    assert (p.gold, p.group) == ("1098", "3")


def test_hint_is_padded_so_that_prompts_of_a_length_are_equally_long(compact):
    assert compact.prompt(problem(compact, 215, 480), hint=True) == "215+480=(0695)"


def test_release_is_the_literal_example(release):
    p = problem(release, 68915, 71898)
    assert release.prompt(p) + release.solution(p) + "\n\n" == SPEC_RELEASE
    hinted = SPEC_RELEASE.replace("Target:\n", "Target: 1 4 0 8 1 3\n")
    assert release.prompt(p, hint=True) + release.solution(p) + "\n\n" == hinted


def test_release_examples_have_the_published_sizes(release):
    for pair, size in (((5, 3), 71), ((68915, 71898), 201)):
        p = problem(release, *pair)
        assert len(release.prompt(p) + release.solution(p) + "\n\n") == size


def test_release_hint_without_carry_is_not_the_answer(release):
    p = problem(release, 23, 44)
    assert "Target: 0 6 7\n" in release.prompt(p, hint=True)
    assert release.solution(p).endswith("\n0 6 7\n</scratch>\n6 7")


def test_scratchpads_equal_a_slow_restatement(compact, release):
    for a, b in pairs_of_every_length():
        assert compact.solution(problem(compact, a, b)) == slow_compact(a, b)
        assert release.solution(problem(release, a, b)) == slow_release(a, b)


def test_alphabets_cover_their_formats(compact, release, direct):
    assert len(arithmetic.ALPHABET) == 20 and arithmetic.ALPHABET[:2] == arithmetic.PAD + arithmetic.EOS
    for task, alphabet in (
        (compact, arithmetic.ALPHABET),
        (direct, arithmetic.ALPHABET),
        (release, ".$0123456789+,:<>/ \n" + "".join(sorted(set("InputTargetscratchC")))),
    ):
        tokenizer = char_tokenizer(alphabet, pad=arithmetic.PAD, eos=arithmetic.EOS)
        for pair in pairs_of_every_length():
            p = problem(task, *pair)
            text = task.prompt(p, hint=True) + task.solution(p)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_longest_rows_are_those_of_the_protocol(compact):
    for n, tokens in ((3, 60), (4, 78)):
        p = problem(compact, 10**n - 1, 10**n - 1)
        assert len(compact.prompt(p, hint=True) + compact.solution(p)) + 1 == tokens  # with EOS


def test_gold_is_right_audited_and_no_leak(compact, release, direct):
    for task in (compact, release, direct):
        for pair in pairs_of_every_length():
            p = problem(task, *pair)
            text = task.solution(p)
            assert task.correct(p, task.parse(text)) and task.cut(text) == text
            assert task.leak(p, text) is None
            assert task.audit(p, text) is (None if task is direct else True)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("215+480,C0|0695|#695", "695"),
        ("#1#2", "2"),
        ("#0695", "0695"),
        ("1098", None),
        ("#", None),
        ("#1098|", None),
        ("#1098 ", None),
        ("#10 98", None),
        ("", None),
        ("#\u0661", None),
    ],
)
def test_compact_answer_is_the_digits_behind_the_last_hash(compact, text, answer):
    assert compact.parse(text) == answer


def test_leading_zero_is_wrong(compact):
    p = problem(compact, 215, 480)
    assert compact.correct(p, "695") and not compact.correct(p, "0695") and not compact.correct(p, None)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<scratch>\nx\n</scratch>\n6 7", "67"),
        ("</scratch>\n0 6 7\n", "067"),
        ("</scratch>\n6 7\n\nInput:\n1", "67"),
        ("</scratch>\n67", None),
        ("</scratch>\n6  7", None),
        ("</scratch>", None),
        ("6 7", None),
        ("</scratch>\n\n6 7", None),
        ("x</scratch>\n6", None),
        ("</scratch>\n6 7 x", None),
    ],
)
def test_release_answer_is_the_spaced_line_after_the_scratchpad(release, text, answer):
    assert release.parse(text) == answer


def test_release_keeps_nothing_behind_the_answer(release):
    p = problem(release, 23, 44)
    text = release.solution(p)
    assert release.cut(text + "\n\nInput:\n4 + 5\nTarget:\n") == text
    assert release.audit(p, text + "\n\nInput:") is True


def test_audit_sees_one_wrong_character(compact, release):
    for task in (compact, release):
        p = problem(task, 737, 361)
        text = task.solution(p)
        for at, character in enumerate(text):
            if character.isdigit():
                assert task.audit(p, text[:at] + str((int(character) + 1) % 10) + text[at + 1 :]) is False


@pytest.mark.parametrize(
    "completion, reason",
    [
        ("737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098", None),
        ("747+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098", None),  # wrong, which is the audit's business
        ("(1098)737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098", "prompt text '('"),
        ("737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098)|#1098", "prompt text ')'"),
        ("#1098", "before computing"),
        ("737+361,C0|1098|#1098", "before computing"),
        ("1098|737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098", "before computing"),
    ],
)
def test_compact_leaks(compact, completion, reason):
    found = compact.leak(problem(compact, 737, 361), completion)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda text: text, None),
        (lambda text: "Target: 0 6 7\n" + text, "prompt text 'Target'"),
        (lambda text: "<scratch>\n0 6 7\n</scratch>\n6 7", "before computing"),
        (lambda text: "<scratch>\n2 3 + 4 4 , C: 0\n0 6 7\n</scratch>\n6 7", "before computing"),
    ],
)
def test_release_leaks(release, change, reason):
    p = problem(release, 23, 44)
    found = release.leak(p, change(release.solution(p)))
    assert found is None if reason is None else reason in found


def test_split_is_by_the_sorted_pair(compact):
    for a, b in pairs_of_every_length():
        low, high = sorted((a, b))
        crc = zlib.crc32(f"{low},{high}".encode())
        expected = "test" if crc % 5 == 0 else "val" if crc % 25 == 1 else "train"
        assert arithmetic.side(a, b) == arithmetic.side(b, a) == expected


def test_shares_of_the_splits():
    counts = collections.Counter(arithmetic.side(a, b) for a in range(10, 100) for b in range(10, 100))
    assert abs(counts["test"] / 8100 - 0.2) < 0.02 and abs(counts["val"] / 8100 - 0.04) < 0.01


def test_no_problem_is_on_two_sides(compact):
    task = make_task("arithmetic", eval_per_length=10_000)
    sides = {split: {frozenset(p.id.split("+")) for p in task.problems(split)} for split in ("val", "test")}
    sides["seeds"] = {frozenset(p.id.split("+")) for p, _ in task.seeds()}
    sides["train"] = {frozenset(p.id.split("+")) for i in range(5) for p in task.pool(i, 0)}
    assert not sides["test"] & (sides["train"] | sides["val"] | sides["seeds"])
    assert not sides["val"] & (sides["train"] | sides["seeds"])


def test_evaluation_is_the_same_sample_for_every_seed(compact):
    other = make_task("arithmetic", seed=5)
    for split in ("val", "test"):
        assert compact.problems(split) == other.problems(split)
    counts = collections.Counter(p.group for p in compact.problems("test"))
    assert counts["2"] == counts["3"] == 250
    every = {(a, b) for a in range(1, 10) for b in range(1, 10) if arithmetic.side(a, b) == "test"}
    assert counts["1"] == len(every) < 30


def test_pool_counts_and_no_duplicates(compact):
    ids = [p.id for p in compact.pool(3, 0)]
    assert len(ids) == len(set(ids))
    assert collections.Counter(p.group for p in compact.pool(3, 0)) == {"1": 60, "2": 800, "3": 2400}


def test_pool_is_a_fresh_draw_per_loop_and_seed(compact):
    again = make_task("arithmetic")
    again.pool(0, 0)  # an earlier draw must not disturb a later one
    assert [p.id for p in again.pool(2, 0)] == [p.id for p in compact.pool(2, 0)]
    pools = [compact.pool(*key) for key in [(0, 0), (1, 0), (0, 1)]]
    draws = [{p.id for p in pool if p.group == "3"} for pool in pools]
    assert all(len(a & b) < 100 for a in draws for b in draws if a is not b)
    assert compact.pool(2, 0, 7) == compact.pool(2, 0)[:7]
    assert len({p.group for p in compact.pool(2, 0, 50)}) > 1  # lengths are shuffled together


def test_pool_asked_for_too_many_gives_all(compact):
    task = make_task("arithmetic", pool={1: 1000, 2: 9000}, seeds={2: (10, 10)})
    counts = collections.Counter(p.group for p in task.pool(0, 0))
    train = [
        (a, b)
        for n in (1, 2)
        for a in range(10 ** (n - 1), 10**n)
        for b in range(10 ** (n - 1), 10**n)
        if arithmetic.side(a, b) == "train"
    ]
    assert counts["1"] == sum(a < 10 for a, _ in train)
    assert counts["2"] == sum(a >= 10 for a, _ in train) - 10


def test_seed_rows_share_problems_and_stay_out_of_longer_pools(compact):
    rows = collections.defaultdict(set)
    for p, hinted in compact.seeds():
        rows[p.group, hinted].add(p.id)
    assert {key: len(ids) for key, ids in rows.items()} == {
        ("1", False): 60,
        ("1", True): 60,
        ("2", False): 500,
        ("2", True): 500,
        ("3", False): 20,
        ("3", True): 150,
    }
    assert rows["2", False] == rows["2", True] and rows["3", False] < rows["3", True]
    pooled = {p.id for i in range(20) for p in compact.pool(i, 0)}
    assert not pooled & (rows["2", True] | rows["3", True])
    assert pooled & rows["1", True]


def test_seed_rows_change_with_the_seed_option_only():
    assert make_task("arithmetic").seeds() == make_task("arithmetic").seeds()
    assert make_task("arithmetic").seeds() != make_task("arithmetic", seed=1).seeds()


def test_ten_digits():
    task = make_task("arithmetic", pool={10: 50}, seeds={})
    assert {len(p.question) for p in task.pool(0, 0)} == {21}
    assert len(task.problems("test")) == 250 and task.seeds() == []


def test_shots_are_of_the_same_length_and_settled_by_the_problem():
    task = make_task("arithmetic", format="release", shots=10, pool={1: 60, 4: 100})
    for p in [*task.pool(0, 0)[:80], *task.problems("test")[:20]]:
        prompt = task.prompt(p)
        blocks = prompt.split("\n\n")
        assert len(blocks) == 11 and blocks[-1] == task.query(p) and prompt == task.prompt(p)
        sums = [block.split("\n")[1].replace(" ", "") for block in blocks]
        assert {len(text) for text in sums} == {len(p.question)}
        assert len(set(sums)) == 11
        assert "+".join(reversed(p.question.split("+"))) not in sums[:-1] and p.question not in sums[:-1]
        hinted = task.prompt(p, hint=True)
        assert hinted.count("Target: ") == 11 and prompt.count("Target: ") == 0
        assert [line for line in hinted.split("\n") if "Target" not in line] == [
            line for line in prompt.split("\n") if "Target" not in line
        ]


def test_shots_come_from_fifty_and_are_never_drawn_or_tested():
    task = make_task("arithmetic", format="release", pool={3: 2000}, seeds={})
    problems = [p for i in range(3) for p in task.pool(i, 0)] + task.problems("test")
    shots = {
        block.split("\n")[1].replace(" ", "") for p in problems[:300] for block in task.prompt(p).split("\n\n")[:-1]
    }
    assert len(shots) == 50
    assert not shots & {p.question for p in problems}


def test_direct_has_the_answer_only(direct):
    p = problem(direct, 737, 361)
    assert (direct.prompt(p), direct.solution(p), direct.parse("#1098")) == ("737+361=", "#1098", "1098")


def test_config_keys_may_be_text():
    task = make_task("arithmetic", pool={"2": 5}, seeds={"2": [3, 4]}, eval_digits=["3"])
    assert len(task.pool(0, 0)) == 5 and len(task.seeds()) == 7
    assert {p.group for p in task.problems("test")} == {"3"}


@pytest.mark.parametrize(
    "options, culprit",
    [
        ({"format": "long"}, "unknown format 'long'"),
        ({"pool": {11: 5}}, "pool names 11 digits"),
        ({"pool": {"two": 5}}, "pool names 'two'"),
        ({"pool": {"\u00b2": 5}}, "pool names '\u00b2'"),
        ({"pool": {2: -1}}, r"pool\[2\]"),
        ({"pool": {2: 0.5}}, r"pool\[2\]"),
        ({"seeds": {2: 5}}, r"seeds\[2\] = 5"),
        ({"seeds": {2: (1, 2, 3)}}, r"seeds\[2\]"),
        ({"shots": 51}, "shots=51"),
        ({"eval_per_length": 0}, "eval_per_length=0"),
        ({"eval_digits": [0]}, "eval_digits"),
    ],
)
def test_bad_options_are_named(options, culprit):
    with pytest.raises(UserError, match=culprit):
        make_task("arithmetic", **options)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098", None),
        ("747+361,C0|4+6,8C0|7+3,08C1|,118C1|1118|#1118", "restated sum"),
        ("737+361,C0|3+6,7C0|7+3,97C0|,097C1|1097|#1097", "wrong digit"),
        ("737+361,C0|3+6,8C1|7+3,08C1|,118C1|1118|#1118", "wrong carry"),
        ("737+361,C0|3+6,8C0|7+3,97C0|,097C1|1097|#1097", "miscopied digit"),
        ("737+361,C0|3+5,8C0|7+3,98C0|,098C1|1098|#1098", "miscopied digit"),
        ("737+361,C0|3+6,8C0|,98C0|098|#98", "miscopied digit"),
        ("737+361,C0|3+6,8C0|,098C1|1098|#1098", "skipped line"),
        ("737+361,C0|3+6", "skipped line"),
        ("737+361,C0|3+6,8C0|7+3,98C0|,098C1|1089|#1089", "copied sum"),
        ("737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1089", "copied answer"),
        ("737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098|", "extra lines"),
    ],
)
def test_the_first_mistake_has_a_name(text, kind):
    task = make_task("arithmetic", pool={3: 5}, seeds={})
    assert task.fault(task.problem(737, 361), text) == kind
