"""`lit-alignment completion`: what a shell needs to complete commands, options and files."""

from collections.abc import Mapping, Sequence

from lit_alignment.tools import TOOLS, TRAINER_COMMANDS, parsers

OF_TRAINER = ("--config", "--ckpt_path", "--print_config", "--seed_everything", "--help")
BASH = """\
# In ~/.bashrc: eval "$(lit-alignment completion bash)"
_lit_alignment() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $before" in
{values}
        esac
        if [ -z "$words" ] && [ "${{word#-}}" != "$word" ]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        fi
    fi
    if [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -o bashdefault -F _lit_alignment lit-alignment
"""
ZSH = """\
# In ~/.zshrc: eval "$(lit-alignment completion zsh)"
autoload -U +X bashcompinit && bashcompinit
{bash}"""


def main(arguments: list[str]) -> None:
    """Print the script of a shell."""
    shell = parsers.completion().parse_args(arguments).shell
    print(script(shell), end="")


def script(shell: str) -> str:
    """What a shell reads at its start to complete our command lines.

    Args:
        shell: bash, zsh or fish.
    """
    texts = TRAINER_COMMANDS | {name: text for name, (_, text) in TOOLS.items()}
    options = dict.fromkeys(TRAINER_COMMANDS, OF_TRAINER) | {name: _options(name) for name in TOOLS}
    choices = {(name, option): given for name in TOOLS for option, given in _choices(name).items()}
    if shell == "fish":
        return _fish(texts, options, choices)
    bash = BASH.format(
        commands=" ".join(texts),
        values="\n".join(f'            "{a} {b}") words="{" ".join(given)}" ;;' for (a, b), given in choices.items()),
        options="\n".join(f'                {name}) words="{" ".join(given)}" ;;' for name, given in options.items()),
    )
    return ZSH.format(bash=bash) if shell == "zsh" else bash


def _options(command: str) -> tuple[str, ...]:
    actions = parsers.PARSERS[command]()._option_string_actions
    return tuple(option for option in actions if option.startswith("--"))


def _choices(command: str) -> dict[str, Sequence[str]]:
    """Values of the options that have a fixed set, and, after the command itself, of its first argument."""
    found: dict[str, Sequence[str]] = {}
    for action in parsers.PARSERS[command]()._actions:
        if action.choices is not None:
            values = [str(each) for each in action.choices]
            found |= dict.fromkeys(action.option_strings or [command], values)
    return found


def _fish(
    texts: Mapping[str, str], options: Mapping[str, Sequence[str]], choices: Mapping[tuple[str, str], Sequence[str]]
) -> str:
    lines = ["# lit-alignment completion fish > ~/.config/fish/completions/lit-alignment.fish"]
    begin = "complete -c lit-alignment"
    for name, text in texts.items():
        lines.append(f"{begin} -n __fish_use_subcommand -f -a {name} -d {_quoted(text)}")
        inside = f"{begin} -n '__fish_seen_subcommand_from {name}'"
        for option in options[name]:
            values = choices.get((name, option))
            given = f" -x -a {_quoted(' '.join(values))}" if values else ""
            lines.append(f"{inside} -l {option.removeprefix('--')}{given}")
        if (values := choices.get((name, name))) is not None:
            lines.append(f"{inside} -f -a {_quoted(' '.join(values))}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
