//! ovn-kubernetes: every pod has a port of its own, and the target's takes over when KubeVirt says that it is ready.
//!
//! | when | shared switch (a layer-2 network of its own) | routed (the cluster's default network) |
//! | --- | --- | --- |
//! | the target pod has a node | its port on the same switch, `enabled=false` and without addresses | its port on the switch of its node, with the VM's addresses |
//! | its annotation `kubevirt.io/migration-target-ready-timestamp` appears | target: `enabled=true`, addresses; source: `enabled=false`, none; in one transaction | the VM's host routes lead out of the cluster router's port on its node's switch |
//! | the source pod has completed | the source's port goes | the source's port goes |
//!
//! Every port requests the chassis of its pod's node, and no activation strategy.
//!
//! Source: `go-controller/pkg/ovn/base_network_controller_pods.go` (`addLogicalPortToNetwork`),
//! `base_network_controller_user_defined.go` (`addLogicalPortToNetworkForNAD`, `disableLiveMigrationSourceLSPOps`,
//! `enableSourceLSPFailedLiveMigration`), `go-controller/pkg/kubevirt/router.go`
//! (`EnsureLocalZonePodAddressesToNodeRoute`) and `pod.go` (`DiscoverLiveMigrationStatus`) of ovn-kubernetes at
//! v1.3.0-748-g8871cd9ce.
//!
//! All nodes are one zone here, which is what its single-zone deployments have; with a zone for every node each of them
//! follows on its own. In the lab a VM has host routes at home, too, so a route is edited in place where ovn-kubernetes
//! would write a first one or take the last one away: northd computes the same. When the annotation appears is the
//! stand-in's doing (`Delays::ready_annotation`). The ports of pods that have completed are taken away by the lab, which
//! plays the part of the CNI's DEL.

use futures::future::BoxFuture;

use crate::lab::routed::node_port;
use crate::lab::topology::Subnet;
use crate::scenario::Topology;

use super::northbound::{Making, PodPort};
use super::{Baseline, Error, Seen, Signs, Stage};

pub(super) struct OvnKubernetes;

/// The ports of both pods.
struct Ports<'a> {
    common: &'a str,
    source: PodPort,
    target: String,
}

impl Baseline for OvnKubernetes {
    fn replay<'a>(&'a self, stage: &'a Stage, signs: Signs) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(hand_over(stage, signs))
    }
}

async fn hand_over(stage: &Stage, mut signs: Signs) -> Result<(), Error> {
    let seen = signs.until_or_over(Seen::has_target).await?;
    let over = seen.is_over();
    let Some(pod) = seen.target_pod.filter(|_| !over) else {
        return Ok(());
    };
    let mut ports = Vec::new();
    for common in &stage.ports {
        ports.push(make_target(stage, common, &pod).await?);
    }
    let seen = signs.until_or_over(|seen| seen.target_ready).await?;
    if seen.target_ready {
        for pair in &ports {
            follow(stage, pair).await?;
        }
        stage.flipped();
    }
    let seen = signs.until(Seen::is_over).await?;
    if seen.succeeded() || !seen.target_ready {
        return Ok(());
    }
    for pair in &ports {
        go_back(stage, pair).await?;
    }
    Ok(())
}

/// The port for the target's pod, named as that of the source's is: `<namespace>_<pod>`.
async fn make_target<'a>(stage: &Stage, common: &'a str, pod: &str) -> Result<Ports<'a>, Error> {
    let source = stage.north.pod_port(common).await?;
    let (namespace, _) = source.1.name.split_once('_').unwrap_or_default();
    let name = format!("{namespace}_{pod}");
    let shared;
    let (switch, enabled) = match stage.topology {
        // The first port of a VM is on the first of the shared switches.
        Topology::Shared => {
            shared = Subnet(0).switch();
            (shared.as_str(), false)
        }
        Topology::Routed => (stage.target.as_str(), true),
    };
    let making = Making {
        name: &name,
        switch,
        chassis: &stage.target,
        enabled,
    };
    stage.north.make_like(&source, making).await?;
    Ok(Ports {
        common,
        source: source.1,
        target: name,
    })
}

async fn follow(stage: &Stage, pair: &Ports<'_>) -> Result<(), Error> {
    let (source, north) = (&pair.source, &stage.north);
    match stage.topology {
        Topology::Shared => {
            north
                .swap(&pair.target, &source.name, &source.addresses)
                .await
        }
        Topology::Routed => north.lead(pair.common, &node_port(&stage.target)).await,
    }
}

/// The target was ready, and the migration failed all the same.
async fn go_back(stage: &Stage, pair: &Ports<'_>) -> Result<(), Error> {
    let (source, north) = (&pair.source, &stage.north);
    match stage.topology {
        Topology::Shared => {
            north
                .swap(&source.name, &pair.target, &source.addresses)
                .await
        }
        Topology::Routed => north.lead(pair.common, &node_port(&stage.source)).await,
    }
}
