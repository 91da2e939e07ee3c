"""Stages: banks whose layers map activations of different shapes, such as those of a ResNet."""
