//! Two chassis and no activation strategy: OVN sends every packet for the port to both, and takes from both what comes.
//!
//! That is `requested-chassis=S,T` alone (ovn-nb(5)), as Neutron writes it with an empty
//! `live_migration_activation_strategy`. It is written when the target pod has a node, and reduced to the target when the
//! migration has succeeded.

use futures::future::BoxFuture;

use super::{Baseline, Error, Seen, Signs, Stage};

pub(super) struct Clones;

impl Baseline for Clones {
    fn replay<'a>(&'a self, stage: &'a Stage, signs: Signs) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(hand_over(stage, signs))
    }
}

async fn hand_over(stage: &Stage, mut signs: Signs) -> Result<(), Error> {
    let seen = signs.until_or_over(Seen::has_target).await?;
    if !seen.is_over() {
        stage.request_both(None).await?;
    }
    let seen = signs.until(Seen::is_over).await?;
    stage.request_where_it_is(&seen).await
}
