//! The custom resource definitions as an operator applies them.

use kube::CustomResourceExt;

use crate::api::{Handover, HandoverPolicy};

/// The definitions as YAML.
///
/// # Errors
///
/// None that can happen to this crate's own types; the serialiser's signature has one.
pub fn yaml() -> Result<String, serde_saphyr::ser_error::Error> {
    let mut text = "# Generated from the Rust types: migration-controller crd\n".to_owned();
    for definition in [Handover::crd(), HandoverPolicy::crd()] {
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(&definition)?);
    }
    Ok(text)
}
