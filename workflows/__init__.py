"""One file a stage: it reads artifacts and writes one.

Ray Data, Ray Train, DeepSpeed and MLflow live here.
"""
