"""The time that a chat template prints: the run's own, whenever and wherever the template is read."""

import json
import string
from datetime import datetime
from functools import lru_cache

# What templates call for the time.
CLOCK = "strftime_now"

# What may stand between `%` and the letter of a strftime directive: `%-d`, `%Ey`.
MODIFIERS = "-_0^#EO"

# The macro below takes a format apart at its `%`. `%%` comes first, because it is a `%` of the text.
MACRO = (
    "{%- macro NAME(format) -%}"
    "{%- set written = TABLE -%}"
    "{%- for half in format.split('%%') -%}{{ '%' if not loop.first }}"
    "{%- for part in half.split('%') -%}"
    "{%- if loop.first -%}{{ part }}"
    "{%- else -%}"
    "{%- set length = 2 if part[:1] and part[:1] in 'MODIFIERS' else 1 -%}"
    "{{ written.get(part[:length], '%' ~ part[:length]) }}{{ part[length:] }}"
    "{%- endif -%}{%- endfor -%}{%- endfor -%}"
    "{%- endmacro -%}\n"
)


@lru_cache(maxsize=8)
def with_time(template: str, now: datetime | None) -> str:
    """`template`, whose clock shows `now` for every format that it may ask for; None leaves it the
    machine's. So all processes of a run, and a run that is resumed on another day, see the same text.

    A template's values are copied on the way to it, functions turned into text, so the clock has to
    be part of the template: a macro of the clock's name, with a table of what directives write.
    """
    if now is None or CLOCK not in template:
        return template
    # The macro ends with a new line, which Jinja takes away again: the template's own first line
    # still begins a line, and loses the white space before its tags as it would alone.
    macro = MACRO.replace("NAME", CLOCK).replace("'MODIFIERS'", f"'{MODIFIERS}'")
    return macro.replace("TABLE", _table(now)) + template


def _table(now: datetime) -> str:
    """Directive without its `%` -> what it writes, as a literal of Jinja."""
    letters = string.ascii_letters
    directives = [*letters, *(first + letter for first in MODIFIERS for letter in letters)]
    written = {directive: now.strftime(f"%{directive}") for directive in directives}
    known = {key: value for key, value in written.items() if value != f"%{key}"}
    return json.dumps(known, ensure_ascii=False)
