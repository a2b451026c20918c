"""Fine-tunes language models in JAX and tells whether it was worth it.

`python -m tuner.main --config=FILE --workdir=DIR` is the program; the modules
beside this one are its parts, each of which imports only what stands below it
(docs/design.md). Importing `tuner` itself imports none of them.
"""

__version__ = '0.1.0'
