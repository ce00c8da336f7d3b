"""What happens around training and predict: checkpoints, exports, reports, speed, predictions."""
