"""Options, fixtures and judgement of the lab are a pytest plugin of the package: framework/arm_kvm/pytest_plugin/."""
