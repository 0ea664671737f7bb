//! `HandoverPolicies` of a scenario, as an operator would apply them.

use anyhow::{Context as _, Result};
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::json;

use crate::scenario::Policy;

const MANAGER: &str = "scenarios";

fn api(client: Client) -> (ApiResource, Api<DynamicObject>) {
    let kind = GroupVersionKind::gvk("segue.io", "v1alpha1", "HandoverPolicy");
    let resource = ApiResource::from_gvk_with_plural(&kind, "handoverpolicies");
    let api = Api::all_with(client, &resource);
    (resource, api)
}

/// Applies them.
pub(super) async fn apply(client: Client, policies: &[Policy]) -> Result<()> {
    let (resource, api) = api(client);
    for policy in policies {
        let object = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {"name": policy.name},
            "spec": policy.spec,
        });
        api.patch(
            &policy.name,
            &PatchParams::apply(MANAGER).force(),
            &Patch::Apply(object),
        )
        .await
        .with_context(|| format!("apply HandoverPolicy {}", policy.name))?;
    }
    Ok(())
}

/// Deletes those that are there.
pub(super) async fn delete(client: Client, policies: &[Policy]) -> Result<()> {
    let (_, api) = api(client);
    for policy in policies {
        match api.delete(&policy.name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            deleted => {
                deleted.with_context(|| format!("delete HandoverPolicy {}", policy.name))?;
            }
        }
    }
    Ok(())
}
