"""The experiment harness for ImageCLEFmedical Caption: from one YAML file to a submission and a rank."""
