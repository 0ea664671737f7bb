//! The custom resource definitions as an operator applies them.

use kube::CustomResourceExt;

use crate::api::Handover;

/// The definitions as YAML.
///
/// # Errors
///
/// None that can happen to this crate's own types; the serialiser's signature has one.
pub fn yaml() -> Result<String, serde_saphyr::ser_error::Error> {
    let header = "# Generated from the Rust types: migration-controller crd\n";
    Ok(format!(
        "{header}{}",
        serde_saphyr::to_string(&Handover::crd())?
    ))
}
