"""Routes of exports: ask for a model, see how far it is, take small files away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as PathPart
from fastapi.responses import FileResponse

from evomerge.errors import LimitError, MissingError
from evomerge.report.recipes import best_number
from evomerge.service.exporting import export_target
from evomerge.service.models import ExportFile, Exports, ExportState, ExportWish, RunName
from evomerge.service.parts import Parts
from evomerge.store.jobs import Export

Number = Annotated[int, PathPart(ge=1, le=2**31 - 1)]
FileName = Annotated[str, PathPart(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]


def router(parts: Parts) -> APIRouter:
    """Return the routes over a service's parts."""
    routes = APIRouter(prefix="/runs/{name}/exports", tags=["exports"])
    store, settings, queue = parts.store, parts.settings, parts.queue

    @routes.post("", status_code=202)
    def begin_export(name: RunName, wish: ExportWish | None = None) -> ExportState:
        """Write the winner or any candidate as a model, in the background; once, however often asked."""
        view = store.run(name)
        number = wish.candidate if wish and wish.candidate is not None else best_number(view)
        view.candidate(number)
        target = export_target(settings, name, number)
        export = queue.add_export(name, number, str(target))
        if export.state == "done" and not target.is_dir():
            queue.set_export(export.id, "failed", "its directory was removed since")
            export = queue.add_export(name, number, str(target))
        parts.supervisor.wake()
        return _state(export, settings.most_download)

    @routes.get("")
    def list_exports(name: RunName) -> Exports:
        """List a run's exports."""
        store.run(name)
        found = [_state(export, settings.most_download) for export in queue.exports(name)]
        return Exports(exports=found)

    @routes.get("/{number}")
    def show_export(name: RunName, number: Number) -> ExportState:
        """Say how far an export is, and which files it has."""
        return _state(_export(name, number), settings.most_download)

    @routes.get(
        "/{number}/files/{file}",
        response_class=FileResponse,
        responses={200: {"content": {"application/octet-stream": {}}}},
    )
    def download(name: RunName, number: Number, file: FileName) -> FileResponse:
        """Send one file, if it is small; a larger one is to be taken from the export's path."""
        export = _export(name, number)
        listed = {one.name: one for one in _files(export, settings.most_download)}
        if file not in listed:
            raise MissingError(f"export {number} of run {name} has no file {file}")
        if not listed[file].download:
            raise LimitError(
                f"{file} has {listed[file].bytes} bytes, over the limit of {settings.most_download}; "
                f"take it from {export.path} on the service's machine"
            )
        path = Path(export.path) / file
        return FileResponse(path, media_type="application/octet-stream", filename=file)

    def _export(name: str, number: int) -> Export:
        for export in queue.exports(name):
            if export.id == number:
                return export
        raise MissingError(f"run {name} has no export {number}")

    return routes


def _state(export: Export, most: int) -> ExportState:
    values = {key: getattr(export, key) for key in Export.__slots__}
    return ExportState(**values, files=_files(export, most))


def _files(export: Export, most: int) -> list[ExportFile]:
    if export.state != "done":
        return []
    found = sorted(p for p in Path(export.path).glob("*") if p.is_file() and not p.is_symlink())
    sizes = {path.name: path.stat().st_size for path in found}
    return [ExportFile(name=name, bytes=size, download=size <= most) for name, size in sizes.items()]
