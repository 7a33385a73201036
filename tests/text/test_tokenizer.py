import codecs
import copy
import itertools
import json
import pickle
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qstar.errors import UserError
from qstar.text import Tokenizer, char_tokenizer, load_tokenizer
from tests.text.kinds import KINDS, tokenizer

ALPHABET = ".$0123456789+,C|#=()"
# Text that clean-up of spaces, sub-word joins and byte fallback each get wrong in their own way.
AWKWARD = [
    "Once upon a time, there was  a girl .",
    " leading and trailing ",
    "12 , 1 3 C: 1\n9 + 8",
    "don 't , clean ! this ?",
    "é 漢字 🤖\t\n\n",
    "",
]


@pytest.fixture(scope="module")
def chars():
    return char_tokenizer(ALPHABET, pad=".", eos="$")


@pytest.fixture(scope="module")
def stories(shared):
    return load_tokenizer(shared("weights/stories260k"))


@pytest.fixture
def folder_of(shared, tmp_path):
    """Copies raw vocabulary files into a folder under the names that checkpoints use."""

    def make(files: dict, config: dict):
        for name, source in files.items():
            shutil.copyfile(shared(f"data/tokenizers/{source}"), tmp_path / name)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def reference(shared, name):
    cases = json.loads(shared("data/tokenizers/reference_ids.json").read_text())[name]["cases"]
    return [(case["text"], case["ids"]) for case in cases]


def test_character_ids_follow_the_alphabet(chars):
    assert chars.encode(ALPHABET) == list(range(20))
    assert (chars.vocab_size, chars.pad_id, chars.eos_id, chars.bos_id) == (20, 0, 1, None)


def test_characters_round_trip_and_special_ones_are_skipped(chars):
    text = "737+361,C0|3+6,8C0|7+3,98C0|,098C1|1098|#1098"
    assert chars.decode(chars.encode(text)) == text
    assert chars.decode([*chars.encode(text), chars.eos_id, chars.pad_id, chars.pad_id]) == text


def test_characters_with_white_space_round_trip():
    tokenizer = char_tokenizer(".$ab \n\t", pad=".", eos="$")
    assert tokenizer.decode(tokenizer.encode(" a\n\n b\t ")) == " a\n\n b\t "


def test_unknown_character_is_named_with_its_place(chars):
    with pytest.raises(UserError, match=r"'x' \(position 2 of '12x3'\)"):
        chars.encode_batch(["12", "12x3"])


def test_saved_character_tokenizer_is_the_same_tokenizer(chars, tmp_path):
    chars.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(ALPHABET) == list(range(20))
    assert (loaded.vocab_size, loaded.pad_id, loaded.eos_id) == (20, 0, 1)
    with pytest.raises(UserError, match="'x'"):
        loaded.encode("x")


@pytest.mark.parametrize(
    "alphabet, pad, eos, culprit",
    [
        ("abca", "a", "b", "'a'"),
        ("abc", ".", "b", "pad='.'"),
        ("abc", "a", "bc", "eos='bc'"),
    ],
)
def test_bad_alphabets_are_refused(alphabet, pad, eos, culprit):
    with pytest.raises(UserError, match=culprit):
        char_tokenizer(alphabet, pad=pad, eos=eos)


def test_batches_equal_single_calls(chars, stories):
    texts = ["Lily", "", "a  b"]
    assert stories.encode_batch(texts, bos=True) == [stories.encode(text, bos=True) for text in texts]
    ids = [stories.encode(text) for text in texts]
    assert [stories.decode(row) for row in ids] == texts
    assert chars.decode(np.array([2, 3], np.int32)) == "01"


def test_bos_only_when_asked_and_only_if_there_is_one(chars, stories):
    assert stories.encode("Once", bos=True) == [stories.bos_id, *stories.encode("Once")]
    assert stories.bos_id not in stories.encode("Once")
    assert chars.encode("12", bos=True) == chars.encode("12")


@pytest.mark.parametrize("text", AWKWARD)
def test_checkpoint_tokenizer_round_trips(stories, text):
    assert stories.decode(stories.encode(text, bos=True)) == text


def test_missing_pad_is_zero(stories):
    assert (stories.vocab_size, stories.pad_id, stories.eos_id) == (512, 0, 2)


def test_tokenizer_is_picklable(stories):
    assert pickle.loads(pickle.dumps(stories)).encode("a b") == stories.encode("a b")


def test_gpt2_files_give_the_published_ids(shared, folder_of):
    files = {"vocab.json": "gpt2/encoder.json", "merges.txt": "gpt2/vocab.bpe"}
    tokenizer = load_tokenizer(folder_of(files, {"tokenizer_class": "GPT2Tokenizer"}))
    for text, ids in reference(shared, "gpt2"):
        assert tokenizer.encode(text) == ids
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in AWKWARD)
    assert tokenizer.vocab_size == 50257


@pytest.mark.parametrize("config", [{"tokenizer_class": "LlamaTokenizer"}, {}])
def test_mistral_file_gives_the_ids_of_sentencepiece(shared, folder_of, config, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = folder_of({"tokenizer.model": "mistral_v1/tokenizer.model"}, config)
    tokenizer = load_tokenizer(folder)
    for text, ids in reference(shared, "mistral_v1/tokenizer.model"):
        assert tokenizer.encode(text) == ids
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [*AWKWARD, "     five", "a" + " " * 9 + "b"]:
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode("  a  b") == original.encode("  a  b")


def test_folder_without_tokenizer_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(tmp_path / "absent") is None


def test_broken_tokenizer_names_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(UserError, match=r"tokenizer\.json: .*broken") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_settings_are_not_blamed_on_the_vocabulary(text, stories, tmp_path):
    stories.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer_config.json.*(broken JSON|expected a JSON object)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_a_byte_order_mark_is_told_of_the_file_that_has_it(name, stories, tmp_path):
    stories.save(tmp_path)
    content = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
    with pytest.raises(UserError, match=rf"{name}: begins with a byte order mark"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("settings, want", [
    ({"tokenizer_class": "MistralCommonBackend"}, {}),
    ({"tokenizer_class": "MistralCommonTokenizer"}, {}),
    ({"tokenizer_class": "PythonBackend"}, {}),
    ({"tokenizer_class": "SentencePieceBackend"}, {}),
    ({"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}, {}),
    ({"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "LlamaTokenizerFast"}),
    ({"extra_special_tokens": ["<s>", "<x>"], "additional_special_tokens": ["<y>", "<s>"]},
     {"additional_special_tokens": ["<y>", "<s>", "<x>"]}),
    ({"extra_special_tokens": ["<x>"], "additional_special_tokens": None}, {"additional_special_tokens": ["<x>"]}),
])  # fmt: skip
def test_an_export_needs_no_class_or_file_that_transformers_4_lacks(settings, want, stories, tmp_path):
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    stories.save(tmp_path / "m")
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps({**settings, **ends}))
    load_tokenizer(tmp_path / "m").save(tmp_path / "out")
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", **want, **ends}
    assert load_tokenizer(tmp_path / "out").encode("Once upon") == stories.encode("Once upon")


@pytest.mark.parametrize("eos", [None, ""])
def test_tokenizer_without_eos_is_refused(eos, stories, tmp_path):
    stories.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": eos}))
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(tmp_path)


def test_words_with_bos_and_without_an_unknown_word():
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "the": 2}, unk_token="<none>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    text = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    assert text.encode("the", bos=True) == [0, 2]


def by_transformers(text, ids):
    return text.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_decoded_with_what_stands_before(kind):
    text = tokenizer(kind)
    prompts = ["Q: Who?\nA:", "def f(x):\n", "7 + 5 =", "", " a b ", "(see\n\n"]
    completions = [" a time", "    return x\n", "\n\nso: ", " ", "12", "x  y", "e.g. one"]
    for prompt, completion in itertools.product(prompts, completions):
        head, tail = text.encode_pair(prompt, completion)
        whole = head + tail
        for k in range(len(tail) + 1):
            expected = by_transformers(text, head + tail[:k])[len(by_transformers(text, head)) :]
            assert text.decode(tail[:k], after=head) == text.decode(np.array(tail[:k]), after=tuple(head)) == expected
        assert prompt + text.decode(tail, after=head) == prompt + completion == by_transformers(text, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_goes_on_is_encoded_as_the_completion_it_is(kind):
    text = tokenizer(kind)
    head = text.encode("Q: Who?\nA:", bos=True)
    for completion in (" a time", "    return x\n", "\n\nso: ", "12", "once"):
        assert text.decode(text.encode_continuation(completion), after=head) == completion


@pytest.mark.parametrize("kind", KINDS)
def test_kept_ids_spell_the_text_that_is_kept(kind):
    text = tokenizer(kind)
    head, ids = text.encode_pair("Q: Who?\nA:", ' It was Tim, who said: "3 + 44 = 47."\n\nThe end.')
    written = text.decode(ids, after=head)
    for at in range(len(written) + 1):
        kept = text.keep(ids, written[:at], after=head)
        assert text.decode(kept, after=head) == written[:at]
        whole = sum(len(text.decode(ids[:k], after=head)) <= at for k in range(1, len(ids) + 1))
        assert kept[:whole] == ids[:whole]


@pytest.mark.parametrize("scheme", ["Llama", "first"])
@pytest.mark.parametrize("special", [True, False])
def test_a_text_behind_an_added_token_has_the_ids_it_is_decoded_from(scheme, special, shared):
    hf = copy.deepcopy(load_tokenizer(shared("weights/stories260k")).hf)
    if scheme == "first":  # a space where the whole text begins, and nowhere else
        hf.backend_tokenizer.normalizer = normalizers.Sequence([])
        hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    hf.add_tokens(["<|assistant|>"], special_tokens=special)
    text = Tokenizer(hf)
    texts = ["12", "\n", " Once upon", "Once upon"]
    for prompt, said in itertools.product(["<|assistant|>", "Tom?<|assistant|>"], texts):
        head, tail = text.encode_pair(prompt, said)
        assert head == text.encode(prompt, bos=True) and text.encode(prompt + said, bos=True) == head + tail
        assert text.decode(tail, after=head) == text.decode(tail, after=np.array(head)) == said
        assert text.encode_behind(head, said) == tail
        for at in range(len(said)):
            assert text.decode(text.keep(tail, said[:at], after=head), after=head) == said[:at]
    assert text.keep(tail, "On", after=head) == text.encode_behind(head, "On")


def test_only_special_tokens_are_ids_of_texts(stories):
    assert stories.special_id("</s>") == stories.eos_id
    assert [stories.special_id(text) for text in ("a", "", "\ud83d")] == [None] * 3


@pytest.mark.parametrize("space", [False, True])
def test_byte_level_tokenizers_with_and_without_a_space_in_front(space):
    alphabet = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
    backend = Backend(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    text = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    head = text.encode("Q: Who?\nA:")
    for said in (" a time", "é\n\n b"):
        ids = text.encode_continuation(said)
        assert text.decode(ids, after=head) == said and text.finish(ids, ["\n", "me"], after=head)[0] in (" a ti", "é")
        assert text.decode(text.keep(ids, said[:2], after=head), after=head) == said[:2]


def test_words_without_the_letter_a_are_decoded_whole():
    backend = Backend(models.WordLevel({"the": 0, "cat": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    text = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))
    assert text.decode([0, 1], after=[1]) == "the cat"


@pytest.mark.parametrize("kind", ["stories260k", "gemma-3-270m"])
def test_a_text_that_begins_with_bos_gets_no_second_one(kind):
    text = tokenizer(kind)
    bos = text.hf.bos_token
    expected = text.hf.encode(f"{bos}Once upon", add_special_tokens=False)
    assert expected.count(text.bos_id) == 1
    assert text.encode(f"{bos}Once upon", bos=True) == text.encode_pair(f"{bos}Once upon", " a")[0] == expected
    assert text.encode(bos, bos=True) == text.encode("", bos=True) == [text.bos_id]
    assert text.encode("Once", bos=True).count(text.bos_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_ends_with_eos_gets_no_second_one(kind):
    text = tokenizer(kind)
    plain = text.encode("Once upon")
    assert text.ended(plain) == text.ended(text.encode(f"Once upon{text.hf.eos_token}")) == [*plain, text.eos_id]
    assert text.ended([]) == [text.eos_id]


def test_a_token_beyond_the_models_vocabulary_is_named(shared):
    stories = load_tokenizer(shared("weights/stories260k"))
    stories.hf.add_tokens(["<think>"], special_tokens=True)
    text = Tokenizer(stories.hf)
    assert text.encode("a<think>")[-1] == 512  # without a model there is no limit
    text.limit = 512
    assert text.encode("a") == stories.encode("a")
    with pytest.raises(UserError, match="'<think>' of the tokenizer has id 512, beyond the model's vocabulary of 512"):
        text.encode_pair("a", "b<think>")
