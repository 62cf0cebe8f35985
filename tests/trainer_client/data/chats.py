"""Tokenizers with chat templates in the styles of known families."""

from __future__ import annotations

import functools
import re
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_IM = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"

TEMPLATES = {
    # every turn alike, and a system message of its own
    "plain": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}" + _IM + "{% endfor %}" + _GENERATE + "{% endif %}",
    # thoughts are in the last turn only, and a turn without any begins with an empty one
    "thinking": "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if loop.last %}"
    "{% if '</think>' in m.content %}{{ m.content }}{% else %}"
    "{{ '<think>\n\n</think>\n\n' + m.content }}{% endif %}{% else %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% else %}"
    + _IM
    + "{% endif %}{% endfor %}"
    + _GENERATE
    + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}",
    # the prompt opens a thought that the history leaves out altogether
    "opened": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1].strip() + '<|end|>' }}{% else %}"
    "{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
    # the text ends with an end of sequence where no answer is asked for
    "ended": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}",
    # a beginning of sequence, and trimmed words
    "headers": "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + "
    "(m.content | trim) + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
    # turns alternate, beginning with the user's
    "strict": "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
}


@functools.cache
def tokenizer(style: str) -> Any:
    """A byte-level tokenizer with this template; it puts its beginning of sequence itself."""
    template = TEMPLATES[style]
    special = sorted({*re.findall(r"<\|[a-z_/]+\|>", template), "<s>", "</s>", "<|user|>"})
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["the quick brown fox says hello to the lazy dog"],
        trainers.BpeTrainer(
            vocab_size=320,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = template
    return wrapped
