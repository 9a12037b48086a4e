"""Templates that put a class name into a sentence, for text encoders."""

from pathlib import Path

from trainer.process.errors import ConfigError

FOLDER = Path(__file__).resolve().parent / "templates"
PHOTO = "photo"
"""The usual single template."""


def shipped() -> list[str]:
    """Names that need no file of the user's."""
    return [PHOTO, *sorted(path.stem for path in FOLDER.glob("*.txt"))]


def read_templates(prompts: str) -> tuple[str, ...]:
    """The templates of `model.prompts`: a template itself, a shipped name, or a file's lines.

    In a file, empty lines and lines that begin with # do not count.

    Raises:
        ConfigError: there is no such file, or a template does not have one `{}`.
    """
    if "{" in prompts:
        lines = [prompts]
    elif prompts == PHOTO:
        lines = ["a photo of a {}."]
    else:
        file = FOLDER / f"{prompts}.txt" if prompts in shipped() else Path(prompts)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"model.prompts: {prompts!r} cannot be read; legal are {', '.join(shipped())}, a "
                "file with one template a line, or a template such as 'a photo of a {}.'"
            ) from error
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        if line.count("{}") != 1 or line.count("{") != 1 or line.count("}") != 1:
            raise ConfigError(f"model.prompts: {line!r} must hold {{}} once, for the class name")
    if not lines:
        raise ConfigError(f"model.prompts: {prompts!r} holds no template")
    return tuple(lines)
