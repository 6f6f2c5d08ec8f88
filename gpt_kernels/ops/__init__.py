"""One home file per op: formula, schema, reference, autograd, public function."""
