"""GGUF, the files of llama.cpp and Ollama, from and to Hugging Face folders.

`read.convert` makes a directory of a GGUF file, `write.write` a GGUF file of
a directory, and `modelfile.text` the Modelfile beside it. Both directions read
the declaration of the model's own weights (`tuner.models`) and beside it what
llama.cpp has otherwise (`architectures`, `changes`, `rope`, `bpe`, `spm`): keys
of metadata and changes of a weight. What neither knows is refused by name.
"""
