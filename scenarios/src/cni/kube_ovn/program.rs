//! The real kube-ovn-controller in the stand-in's place.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions::is_crd_established};
use kube::{Api, Client};
use ovsdb_rs::{ClientOptions, Endpoints, Replica};
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::cache::Group;
use super::{Settings, groups, pods};
use crate::lab::Host;
use crate::lab::topology::Subnet;

const MANAGER: &str = "scenarios";
const GROUP: &str = "kubeovn.io";
/// It waits for its caches, makes its VPC and subnets, and starts some fifty workers.
const READY_DEADLINE: Duration = Duration::from_mins(2);
const ESTABLISHED_DEADLINE: Duration = Duration::from_secs(30);
/// Its kinds: plural, kind, whether they have a status of their own. Their schemas are left out.
const KINDS: [(&str, &str, bool); 21] = [
    ("ippools", "IPPool", true),
    ("ips", "IP", false),
    ("iptables-dnat-rules", "IptablesDnatRule", true),
    ("iptables-eips", "IptablesEIP", true),
    ("iptables-fip-rules", "IptablesFIPRule", true),
    ("iptables-snat-rules", "IptablesSnatRule", true),
    ("ovn-dnat-rules", "OvnDnatRule", true),
    ("ovn-eips", "OvnEip", true),
    ("ovn-fips", "OvnFip", true),
    ("ovn-snat-rules", "OvnSnatRule", true),
    ("provider-networks", "ProviderNetwork", true),
    ("qos-policies", "QoSPolicy", true),
    ("security-groups", "SecurityGroup", true),
    ("subnets", "Subnet", true),
    ("switch-lb-rules", "SwitchLBRule", true),
    ("vips", "Vip", false),
    ("vlans", "Vlan", true),
    ("vpc-dnses", "VpcDns", true),
    (NAMESPACED, "VpcEgressGateway", true),
    ("vpc-nat-gateways", "VpcNatGateway", true),
    ("vpcs", "Vpc", true),
];
/// The one that is not the cluster's.
const NAMESPACED: &str = "vpc-egress-gateways";
/// Its log directory is its own alone: the machine's may have another Kube-OVN's.
const IN_PRIVATE_LOGS: &str =
    "mount -t tmpfs none /var/log && mkdir /var/log/kube-ovn && exec \"$@\"";

/// The program, and where it is run.
#[derive(Clone, Debug)]
pub struct Program {
    /// kube-ovn-controller.
    pub path: PathBuf,
    /// In whose network it runs.
    pub host: Host,
    /// Its identity.
    pub kubeconfig: PathBuf,
    /// The Southbound, like `tcp:172.30.0.1:6642`.
    pub southbound: String,
    /// Where it logs.
    pub log: PathBuf,
}

/// The program, running.
pub(super) struct Running(Child);

impl Program {
    /// Starts it and returns once its port groups are there.
    pub(super) async fn start(&self, settings: &Settings, client: Client) -> Result<Running> {
        ensure!(
            settings.subnets.len() == 1,
            "the real kube-ovn-controller is told of one network: give the VMs one port each"
        );
        apply_crds(&client).await?;
        // It deletes every chassis of which no node says that it is its own.
        for node in &settings.nodes {
            let annotations = json!({(pods::annotation(super::PROVIDER, "chassis")): node});
            let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
            let nodes: Api<Node> = Api::all(client.clone());
            let annotated = nodes.patch(node, &PatchParams::default(), &patch).await;
            annotated.with_context(|| format!("annotate node {node}"))?;
        }
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| self.log.display().to_string())?;
        let mut command = self.host.netns_command("unshare")?;
        command
            .args(["--mount", "sh", "-c", IN_PRIVATE_LOGS, "sh"])
            .arg(&self.path)
            .args(self.arguments(settings)?)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("POD_NAME", "kube-ovn-controller")
            .env("POD_NAMESPACE", "kube-system")
            .env("ENABLE_SSL", "false")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = Command::from(command).kill_on_drop(true).spawn();
        let mut running = Running(child.with_context(|| self.path.display().to_string())?);
        let ready = timeout(READY_DEADLINE, groups_are_there(settings));
        tokio::select! {
            ready = ready => match ready {
                Ok(ready) => ready?,
                Err(_) => bail!("no port groups in time; its log is {}", self.log.display()),
            },
            ended = running.0.wait() => bail!(
                "{} ended with {}; its log is {}",
                self.path.display(),
                ended.context("kube-ovn-controller")?,
                self.log.display()
            ),
        }
        Ok(running)
    }

    fn arguments(&self, settings: &Settings) -> Result<Vec<OsString>> {
        let subnet = settings.subnets.first().context("no subnet")?;
        let ranges = Subnet(0);
        let mut kubeconfig = OsString::from("--kubeconfig=");
        kubeconfig.push(&self.kubeconfig);
        let mut arguments = vec![kubeconfig];
        arguments.extend(
            [
                format!("--ovn-nb-addr={}", settings.northbound),
                format!("--ovn-sb-addr={}", self.southbound),
                format!("--default-ls={subnet}"),
                format!("--default-cidr={}", ranges.cidrs()),
                format!("--default-gateway={}", ranges.gateways()),
                "--default-gateway-check=false".to_owned(),
                "--node-switch-cidr=100.64.0.0/16,fd00:100:64::/112".to_owned(),
                "--service-cluster-ip-range=10.96.0.0/12,fd00:10:96::/112".to_owned(),
                format!("--enable-live-migration-optimize={}", settings.optimize),
                "--keep-vm-ip=true".to_owned(),
                // It deletes the switches that it does not know without that.
                "--enable-external-vpc=true".to_owned(),
                "--enable-metrics=false".to_owned(),
                // The lab may have no time for it for a while.
                "--leader-elect-lease-duration=60s".to_owned(),
                "--leader-elect-renew-deadline=50s".to_owned(),
            ]
            .map(OsString::from),
        );
        Ok(arguments)
    }
}

impl Running {
    pub(super) async fn kill(mut self) {
        // One that has ended is what is asked for.
        _ = self.0.kill().await;
    }
}

async fn apply_crds(client: &Client) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for (plural, kind, has_status) in KINDS {
        let name = format!("{plural}.{GROUP}");
        let crd = crd(plural, kind, has_status);
        let apply = PatchParams::apply(MANAGER).force();
        let applied = crds.patch(&name, &apply, &Patch::Apply(crd)).await;
        applied.with_context(|| format!("install the CRD {name}"))?;
    }
    for (plural, ..) in KINDS {
        let name = format!("{plural}.{GROUP}");
        let established = await_condition(crds.clone(), &name, is_crd_established());
        let established = timeout(ESTABLISHED_DEADLINE, established).await;
        established.with_context(|| format!("the CRD {name} is not served"))??;
    }
    Ok(())
}

fn crd(plural: &str, kind: &str, has_status: bool) -> serde_json::Value {
    let any = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let mut version = json!({
        "name": "v1",
        "served": true,
        "storage": true,
        "schema": {"openAPIV3Schema": any},
    });
    if has_status {
        version["subresources"] = json!({"status": {}});
    }
    let scope = if plural == NAMESPACED {
        "Namespaced"
    } else {
        "Cluster"
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{GROUP}")},
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {"plural": plural, "singular": kind.to_lowercase(), "kind": kind},
            "versions": [version],
        },
    })
}

/// Returns once every node has its port groups.
async fn groups_are_there(settings: &Settings) -> Result<()> {
    let endpoints: Endpoints = settings.northbound.parse().context("the lab's endpoint")?;
    let client = ovsdb_rs::Client::connect(endpoints, ClientOptions::default()).await?;
    let north = Replica::builder("OVN_Northbound")
        .table::<Group>()
        .start(&client)?;
    north.wait_synced().await.context("the Northbound")?;
    let mut changed = north.changed();
    let wanted: Vec<_> = settings
        .nodes
        .iter()
        .flat_map(|node| {
            let of_subnets = settings
                .subnets
                .iter()
                .map(|subnet| groups::of_subnet(subnet, node));
            of_subnets.chain([groups::of_node(node)])
        })
        .collect();
    loop {
        let there = north.rows::<Group>();
        let is_there = |name: &String| there.iter().any(|(_, group)| group.name == *name);
        if wanted.iter().all(is_there) {
            return Ok(());
        }
        changed.changed().await.context("the Northbound is gone")?;
    }
}
