//! One chassis at a time: the port is bound to the target when the guest resumes there.
//!
//! What there was before OVN 22.06 knew lists: `requested-chassis` is changed from the source to the target. The sign is
//! the earliest that tells of the resume, libvirt's event on the target, and the runner is told of it within a
//! millisecond.

use futures::future::BoxFuture;

use super::{Baseline, Error, Signs, Stage};

pub(super) struct Single;

impl Baseline for Single {
    fn replay<'a>(&'a self, stage: &'a Stage, signs: Signs) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(hand_over(stage, signs))
    }
}

async fn hand_over(stage: &Stage, mut signs: Signs) -> Result<(), Error> {
    let seen = signs.until_or_over(|seen| seen.resumed).await?;
    if seen.resumed {
        stage.request_one(&stage.target).await?;
        stage.flipped();
    }
    let seen = signs.until(super::Seen::is_over).await?;
    // A guest that resumed on the target may still have been lost there.
    stage.request_where_it_is(&seen).await
}
