//! Frames that the queues of a guest's taps had no room for.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result};

use crate::lab::Host;
use crate::scenario::Moment;

use super::Bench;
use super::feeders::Followed;
use super::inside::inside;
use super::moments::Moments;
use super::vm::RunningVm;

/// Counts, on source and target, what is dropped from when the target's hypervisor has its taps until the migration is
/// over. On the source it ends when the guest has resumed: nobody reads its taps after that.
pub(super) async fn dropped(
    bench: &Bench<'_>,
    vm: &RunningVm,
    followed: &Followed,
    moments: &Moments,
) -> Result<u64> {
    tokio::select! {
        () = moments.wait(Moment::Copying) => {}
        () = moments.wait(Moment::Ended) => return Ok(0),
    }
    let source = bench.lab.host(&followed.source)?;
    let target = bench.lab.host(&followed.target)?;
    let taps: Vec<_> = vm.nics.iter().map(crate::lab::Nic::tap).collect();
    let before = (
        counters(source, &taps).await?,
        counters(target, &taps).await?,
    );
    tokio::select! {
        () = moments.wait(Moment::Resumed) => {}
        () = moments.wait(Moment::Ended) => {}
    }
    let on_source = since(&before.0, &counters(source, &taps).await?);
    moments.wait(Moment::Ended).await;
    Ok(on_source + since(&before.1, &counters(target, &taps).await?))
}

/// How much counters have grown; a tap that is gone has dropped nothing more.
fn since(before: &BTreeMap<String, u64>, now: &BTreeMap<String, u64>) -> u64 {
    let grown = now.iter().map(|(tap, count)| {
        let before = before.get(tap).copied().unwrap_or(0);
        count.saturating_sub(before)
    });
    grown.sum()
}

/// What each of these interfaces has dropped so far of what it was to transmit, as far as they are there.
async fn counters(node: &Host, taps: &[String]) -> Result<BTreeMap<String, u64>> {
    let taps = taps.to_vec();
    inside(node, "taps", move || {
        // Of the thread's network: `/proc/net` is that of the process.
        let path = "/proc/thread-self/net/dev";
        let text = fs::read_to_string(path).context(path)?;
        let all = text.lines().filter_map(transmit_drops);
        Ok(all.filter(|(name, _)| taps.contains(name)).collect())
    })
    .await
}

/// The name of an interface, and what it has dropped: the fourth of the transmit columns, proc_pid_net(5).
fn transmit_drops(line: &str) -> Option<(String, u64)> {
    let (name, counts) = line.split_once(':')?;
    let dropped = counts.split_whitespace().nth(8 + 3)?;
    Some((name.trim().to_owned(), dropped.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_read_from_the_transmit_columns() {
        let line = " vm1:  101  2    0  7    0     0          0         0  505  6    0  9    0     0       0          0";
        assert_eq!(transmit_drops(line), Some(("vm1".to_owned(), 9)));
        assert_eq!(transmit_drops("Inter-|   Receive  |  Transmit"), None);
        assert_eq!(transmit_drops(" face |bytes    packets errs drop"), None);
    }

    #[test]
    fn a_tap_that_comes_counts_from_zero_and_one_that_goes_no_more() {
        let counts = |counts: &[(&str, u64)]| -> BTreeMap<String, u64> {
            let owned = counts.iter().map(|&(name, count)| (name.to_owned(), count));
            owned.collect()
        };
        let before = counts(&[("stays", 3), ("goes", 5)]);
        assert_eq!(since(&before, &counts(&[("stays", 4), ("comes", 2)])), 3);
    }
}
