//! Neutron's ML2/OVN driver, under Nova.
//!
//! | when | written |
//! | --- | --- |
//! | Nova binds the port for the target (`migrating_to`), before the guest is copied | `requested-chassis=S,T`, `activation-strategy=rarp` |
//! | the live migration has ended, and Nova activates the target's binding | `requested-chassis=T`, no strategy |
//! | it has failed | `requested-chassis=S`, no strategy |
//!
//! Source: `neutron/plugins/ml2/drivers/ovn/mech_driver/ovsdb/ovn_client.py` (`_configure_requested_chassis_options`) and
//! `neutron/conf/plugins/ml2/drivers/ovn/ovn_conf.py` (`live_migration_activation_strategy`, by default `rarp`) of neutron
//! at 29.0.0.0b1-105-g2131d26f73; `nova/compute/manager.py` (`_post_live_migration`, `handle_lifecycle_event`) and
//! `nova/virt/libvirt/host.py` (`_event_lifecycle_callback`) of nova at 33.0.0-373-g00a030403f.
//!
//! The target's binding comes here when the target pod has a node, which is as early as there is one. The end is
//! libvirt's word on the source that the guest has left; Nova looks for the end of the job twice a second, and this half
//! second is left out. Nova also activates the binding when libvirt suspends the guest on the source, if the job is
//! complete by then; of a job that succeeds it is not.
//!
//! Before Nova lets the guest move, Neutron waits until the target's `ovn-controller` has applied a later `nb_cfg`. Here
//! the stand-in for KubeVirt takes more than a second from the pod's node to the copy, which is longer than that.

use futures::future::BoxFuture;

use super::{Baseline, Error, Seen, Signs, Stage};

pub(super) struct Neutron;

impl Baseline for Neutron {
    fn replay<'a>(&'a self, stage: &'a Stage, signs: Signs) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(hand_over(stage, signs))
    }
}

async fn hand_over(stage: &Stage, mut signs: Signs) -> Result<(), Error> {
    let seen = signs.until_or_over(Seen::has_target).await?;
    if !seen.is_over() {
        stage.request_both(Some("rarp")).await?;
    }
    let seen = signs.until_or_over(|seen| seen.left).await?;
    if seen.left {
        stage.request_one(&stage.target).await
    } else {
        stage.request_where_it_is(&seen).await
    }
}
