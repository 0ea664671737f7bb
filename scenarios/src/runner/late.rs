//! A migration that does not come to its end, and where it stands.

use std::fmt::Write as _;

use anyhow::{Result, anyhow};
use kube::Api;
use serde_json::json;

use crate::kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration};

use super::Bench;
use super::feeders::Followed;
use super::moments::Moments;

/// The error that says what has happened, and what Kubernetes and the hypervisors say of it by now.
pub(super) async fn late(
    bench: &Bench<'_>,
    followed: &Followed,
    moments: &Moments,
    seconds: u64,
) -> anyhow::Error {
    let Followed {
        namespace, name, ..
    } = followed;
    let so_far = moments.so_far();
    let mut said = format!(
        "migration {namespace}/{name} did not come to its end within {seconds} s; so far: {so_far}"
    );
    let objects = objects(bench, followed).await;
    let objects = objects.unwrap_or_else(|error| format!("{error:#}"));
    // Writing to a string cannot fail.
    _ = write!(said, "; {objects}");
    for node in bench.lab.nodes() {
        let domains = node.libvirt().virsh(["list", "--all"]).await;
        let domains = domains.unwrap_or_else(|error| format!("{error:#}"));
        let words: Vec<_> = domains.split_whitespace().collect();
        _ = write!(said, "; domains of {}: {}", node.name(), words.join(" "));
    }
    anyhow!(said)
}

async fn objects(bench: &Bench<'_>, followed: &Followed) -> Result<String> {
    let (client, namespace) = (bench.cluster.client(), &followed.namespace);
    let migrations: Api<VirtualMachineInstanceMigration> =
        Api::namespaced(client.clone(), namespace);
    let migration = migrations.get(&followed.name).await?;
    let vms: Api<VirtualMachineInstance> = Api::namespaced(client, namespace);
    let vm = vms.get(&migration.spec.vmi_name).await?;
    Ok(format!(
        "its phase: {}; migrationState of VirtualMachineInstance {}: {}",
        json!(migration.phase()),
        migration.spec.vmi_name,
        json!(vm.migration_state())
    ))
}
