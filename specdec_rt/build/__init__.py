"""From a bundle's ONNX graphs to engines, on the machine where they run: recipes, profiles, building, the cache."""
