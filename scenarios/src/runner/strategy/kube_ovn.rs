//! Kube-OVN with `--enable-live-migration-optimize`, which is its default.
//!
//! | when | written |
//! | --- | --- |
//! | the migration's phase is Scheduling, and the target pod has a node | `requested-chassis=S,T`, `activation-strategy=rarp` |
//! | Succeeded | `requested-chassis=T`, no strategy |
//! | Failed | `requested-chassis=S`, no strategy |
//!
//! Source: `pkg/controller/kubevirt.go` (`handleAddOrUpdateVMIMigration`) and `pkg/ovs/ovn-nb-logical_switch_port.go`
//! (`SetLogicalSwitchPortMigrateOptions`, `ResetLogicalSwitchPortMigrateOptions`) of kube-ovn at v1.16.0-400-g1533681d7
//! (VERSION v1.17.0).
//!
//! Where the pod has no node yet Kube-OVN queues the migration again, with a back-off; here the node is waited for. It
//! acts on a change of phase: one that is over before it is seen leaves the port as it was. Here a later phase will do.

use futures::future::BoxFuture;

use crate::kubevirt::VmimPhase;

use super::{Baseline, Error, Signs, Stage};

pub(super) struct KubeOvn;

impl Baseline for KubeOvn {
    fn replay<'a>(&'a self, stage: &'a Stage, signs: Signs) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(hand_over(stage, signs))
    }
}

async fn hand_over(stage: &Stage, mut signs: Signs) -> Result<(), Error> {
    let seen = signs
        .until_or_over(|seen| seen.phase >= Some(VmimPhase::Scheduling) && seen.has_target())
        .await?;
    if !seen.is_over() {
        stage.request_both(Some("rarp")).await?;
    }
    let seen = signs.until(super::Seen::is_over).await?;
    stage.request_where_it_is(&seen).await
}
