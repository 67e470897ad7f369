from tests.track.conftest import store, template

__all__ = ["store", "template"]
