import pytest
from checkpoints import RECIPES, VARIANTS, copy_of, make_checkpoint

pytest.importorskip("llmcompressor")


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """Return the directory of a sound checkpoint by name, made when it is first asked for.

    Beside it, ``model`` is the 16-bit model that it was quantized from. Not to be changed.
    """
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(name):
        if name in made:
            return made[name]
        directory = root / name
        if name in RECIPES:
            make_checkpoint(name, directory)
        else:
            original, change = VARIANTS[name]
            change(copy_of(get(original), directory / "out"))
            copy_of(get(original).parent / "model", directory / "model")
        made[name] = directory / "out"
        return made[name]

    return get
