"""`natsync completion`: what makes a shell complete commands and options of natsync."""

import click
from click.shell_completion import get_completion_class

#: click answers the shell's questions when this variable says which shell asks.
_VARIABLE = "_NATSYNC_COMPLETE"


@click.command(short_help="Print what makes a shell complete natsync's commands.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: eval "$(natsync completion bash)"        in ~/.bashrc (bash 4.4 or newer)
    zsh:  eval "$(natsync completion zsh)"         in ~/.zshrc, behind compinit
    fish: natsync completion fish | source         in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    # Not source(): for bash it would run the bash found first on the PATH, to look at its version.
    script = kind(ctx.find_root().command, {}, "natsync", _VARIABLE)
    click.echo(script.source_template % script.source_vars())
