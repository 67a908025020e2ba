"""The commands `export` and `render`."""

from pathlib import Path
from typing import Annotated

import typer

from flashdip.engine.errors import ConfigError, InputError

Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]


def export(
    fit: Annotated[
        Path, typer.Argument(metavar="FIT_DIR", help="What --save-dir of a fit has written.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.onnx", help="Model to write.")
    ],
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Compute, and keep the weights, in float16.")
    ] = False,
    no_distil: Annotated[
        bool, typer.Option("--no-distil", help="Export the network as the fit left it.")
    ] = False,
    steps: Annotated[
        int, typer.Option(min=1, help="The most iterations of distilling; 45 dB end it sooner.")
    ] = 200,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Another size of picture; for input=meshgrid only."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to distil: cpu, cuda, cuda:1, mps, ... or auto.")
    ] = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write a fitted network as an ONNX model that draws its picture.

    A fit's picture is an average that no network drew. So the network is first fitted to that
    picture, which takes seconds; how near it came is printed and kept in the model.

    Example: flashdip export run -o model.onnx
    """
    from flashdip.engine.files import atomic, check_writable, one_line

    wanted = None if size is None else _size(size)
    check_writable(output, force=force)
    # From here on torch is needed, which takes a second or two to import.
    from flashdip.engine.onnx.distil import TARGET
    from flashdip.engine.onnx.export import export as make
    from flashdip.engine.progress import Interruption, show_progress
    from flashdip.engine.result import Result

    result = Result.load(fit)
    with Interruption() as interruption, show_progress("export", quiet=quiet) as show:
        try:
            made = make(
                result,
                fp16=fp16,
                steps=None if no_distil else steps,
                size=wanted,
                device=device,
                callback=interruption.watch(show),
                interrupted=interruption,
            )
        except InputError as error:
            raise type(error)(f"{one_line(fit)}: {one_line(error)}") from None
        with atomic(output, force=force) as temporary:
            temporary.write_bytes(made.model)
    if not quiet:
        how = "the network as the fit left it" if no_distil else made.notes["distilled"]
        if not no_distil and made.quality < TARGET:
            how += f", short of {TARGET:.0f} dB: more --steps may bring it nearer"
        where = "" if wanted is None else " at the fit's size"
        typer.echo(
            f"{output} written: {made.quality:.2f} dB between what it draws and the fit's picture"
            f"{where} ({how})",
            err=True,
        )
    if made.interrupted and interruption.signal is not None:
        raise typer.Exit(128 + interruption.signal)


def render(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="What 'flashdip export' has written.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Picture to write: .png, .jpg, .webp or .tif."
        ),
    ],
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="What is to run it, first choice first: tensorrt, cuda, migraphx, openvino, "
            "coreml, dml, webgpu, cpu. Without it whatever there is, with the CPU for the rest.",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="The narrowest type TensorRT may compute in: fp32, fp16 or bf16.")
    ] = "fp32",
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU.")] = 0,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT", help="Refuse larger pictures before drawing them; else 100 million."
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Draw the picture of an exported model with ONNX Runtime.

    Example: flashdip render model.onnx -o image.png
    """
    from flashdip.engine.files import check_writable
    from flashdip.engine.images import MAX_PIXELS, save
    from flashdip.engine.onnx.options import Tuning
    from flashdip.engine.onnx.providers import open_session, tell
    from flashdip.engine.onnx.render import load, picture

    check_writable(output, force=force)
    tuning = Tuning(precision, device=device)  # type: ignore[arg-type]  # it checks
    content, notes = load(model, max_pixels=max_pixels or MAX_PIXELS)
    names = None if provider is None else provider.split(",")
    say = (lambda line: None) if quiet else tell
    session = open_session(content, names, tuning=tuning, tell=say)
    (drawn,) = session.run(["image"], {})
    save(output, picture(drawn[0], notes), force=force)
    if not quiet:
        typer.echo(f"{output} written", err=True)


def _size(text: str) -> tuple[int, int]:
    """Return height and width of what was given to --size.

    Raises:
        ConfigError: It is not WxH.
    """
    width, cross, height = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"size: expected WIDTHxHEIGHT such as 640x480, got {text!r}")
    return int(height), int(width)
