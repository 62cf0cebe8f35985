"""Renderings of all beginnings of a conversation from one, where a template permits it.

A template permits it where what it writes of a message depends on nothing behind that: one loop
over the messages that looks neither ahead nor at its end, and behind the loop nothing that the loop
has changed. Its syntax tree shows that. Marks between the messages then say where each ends, and a
conversation costs what it is long, not the square of its turns.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Template, nodes
from transformers.utils import chat_template_utils

#: Between two messages; of the private use area, so that no text has it by accident.
_MARK = "\ue000\uf8ff\ue000"
#: What a loop may know of where it is.
_BEHIND = ("first", "index", "index0", "previtem", "depth")


@dataclass(frozen=True)
class Prefixes:
    """A conversation's rendering, and what stands behind each of its beginnings."""

    whole: str
    #: where each number of messages ends, from none of them on
    ends: Sequence[int]
    #: what asks for an answer, in each of the usual ways
    asking: Sequence[str]
    #: what stands behind where no answer is asked for
    closing: str

    def text(self, count: int) -> str:
        """The first ``count`` messages."""
        return self.whole[: self.ends[count]] + self.closing

    def prompts(self, count: int) -> list[str]:
        """The same with an answer asked for, the usual way first."""
        return [self.whole[: self.ends[count]] + asking for asking in self.asking]


def prefixes(
    template: str | None,
    messages: Sequence[Any],
    known: Mapping[str, Any],
    variants: Sequence[Mapping[str, Any]],
) -> Prefixes | None:
    """All beginnings of these messages; None where the template does not permit it.

    ``known`` is what the template is told; ``variants`` are the ways to ask for an answer.
    """
    marked = _marked(template) if template else None
    if marked is None:
        return None

    def parts(**more: Any) -> list[str]:
        told = {"documents": None, "tools": None, **known, "messages": list(messages), **more}
        return str(marked.render(**told)).split(_MARK)

    asking: list[str] = []
    try:
        *pieces, closing = parts(add_generation_prompt=False)
        for variant in variants:
            *before, tail = parts(add_generation_prompt=True, **variant)
            if before != pieces:
                return None
            if tail not in asking:
                asking.append(tail)
    except Exception:  # what a template raises; the usual way says what
        return None
    if len(pieces) != len(messages) + 1:
        return None
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    return Prefixes("".join(pieces) + closing, ends[1:], asking, closing)


@functools.lru_cache(maxsize=8)
def _marked(template: str) -> Template | None:
    """The template with marks around each message; None where it looks ahead."""
    try:
        environment = chat_template_utils._compile_jinja_template(template).environment
        tree = environment.parse(template)
        at = _permitting_loop(tree)
        if at is None:
            return None
        loop = tree.body[at]
        assert isinstance(loop, nodes.For)
        loop.body.insert(0, _mark())
        tree.body.insert(at + 1, _mark())
        code = environment.compile(tree)
        return Template.from_code(environment, code, environment.make_globals(None))
    except Exception:  # another transformers, or a template that is none
        return None


def _mark() -> nodes.Output:
    return nodes.Output([nodes.TemplateData(_MARK, lineno=1)], lineno=1)


def _permitting_loop(tree: nodes.Template) -> int | None:
    """Where in the tree the one loop over the messages is, if it looks at nothing ahead."""
    names = {"messages"} | {
        node.target.name
        for node in tree.body
        if isinstance(node, nodes.Assign)
        and isinstance(node.target, nodes.Name)
        and isinstance(node.node, nodes.Name)
        and node.node.name == "messages"
    }
    loops = [
        (at, node)
        for at, node in enumerate(tree.body)
        if isinstance(node, nodes.For)
        and isinstance(node.iter, nodes.Name)
        and node.iter.name in names
    ]
    if len(loops) != 1:
        return None
    at, loop = loops[0]
    if loop.test or loop.else_ or loop.recursive:
        return None
    looked = sum(node.name in names and node.ctx == "load" for node in tree.find_all(nodes.Name))
    first = sum(map(functools.partial(_is_first, names), tree.find_all(nodes.Getitem)))
    aliases = len(names) - 1
    if looked != 1 + first + aliases or not _looks_behind(loop):
        return None
    changed = {node.name for node in loop.find_all(nodes.NSRef)}
    later = {name.name for node in tree.body[at + 1 :] for name in node.find_all(nodes.Name)}
    return None if changed & later else at


def _is_first(names: set[str], node: nodes.Getitem) -> bool:
    """Whether it is ``messages[0]``."""
    of_messages = isinstance(node.node, nodes.Name) and node.node.name in names
    return of_messages and isinstance(node.arg, nodes.Const) and node.arg.value == 0


def _looks_behind(loop: nodes.For) -> bool:
    """Whether all that is asked of ``loop`` is known without what comes later."""
    asked = sum(node.name == "loop" for node in loop.find_all(nodes.Name))
    harmless = sum(
        isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr in _BEHIND
        for node in loop.find_all(nodes.Getattr)
    )
    return asked == harmless
