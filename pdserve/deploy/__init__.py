"""From one small file to the manifests of a deployment on Kubernetes."""
