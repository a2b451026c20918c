"""GGUF, the files of llama.cpp and Ollama, from and to Hugging Face folders.

`read.convert` makes a directory of a GGUF file, `write.write` a GGUF file of
a directory, and `modelfile.text` the Modelfile beside it. Both directions read
one declaration (`architectures`, `rope`, `bpe`, `spm`): which key of
config.json is which metadata key, and what llama.cpp changes in a weight on
the way in. What that declaration does not know is refused by name.
"""
