"""Published systems, a folder each: `model` computes, `method` trains, `config` sets, `published` reads checkpoints."""
