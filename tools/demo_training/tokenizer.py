"""The demo model's tokenizer: byte-level BPE, one token a digit, and turns of chat.

The pre-tokenizer cuts text at line breaks, digits, words and punctuation, so that encoding text piece by
piece (cut at a line break or before a space and a word) gives the tokens of the whole.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from xkv_service.demo import documents, ruler_tasks

PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = range(6)
SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
MAX_POSITIONS = 16384

_PIECES = r"\n+|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|\s"
_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('Unknown role ' + message.role + ': use system, user or assistant.') -}}
  {%- endif -%}
  {{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(seed: int, vocabulary: int, texts: int = 1200) -> PreTrainedTokenizerFast:
    """Train the tokenizer on ``texts`` documents of the generator and the answers to their questions."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[BEGIN]} $A", special_tokens=[(SPECIAL_TOKENS[BEGIN], BEGIN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[BEGIN],
        eos_token=SPECIAL_TOKENS[END],
        pad_token=SPECIAL_TOKENS[PAD],
        additional_special_tokens=list(SPECIAL_TOKENS[SYSTEM:]),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _texts(seed: int, count: int) -> Iterator[str]:
    rng = Random(seed)
    for i in range(count):
        if i % 4:
            document = documents.make_document(rng, 800)
        else:
            document = ruler_tasks.make_task(rng.choice(ruler_tasks.TASKS), rng, 800, spread=2)
        yield document.text
        for question in document.questions:
            yield f"{question.question}\n{question.answer}"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the bare tokenizer that the data workers encode with."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
