"""From embeddings to a trained head: the objective, Lightning's module, and how a head is brought from its start to a guard."""
