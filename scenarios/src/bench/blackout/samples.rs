//! Made-up migrations, for tests.

use super::picture::{Picture, Way};
use super::{Figures, Run};
use crate::scenario::{Strategy, Topology};

/// A migration with this pause and this added downtime, in milliseconds, that lost so many packets towards the VM.
pub(super) fn figures(pause_ms: f64, network_added_ms: f64, to_vm_lost: u64) -> Figures {
    Figures {
        source: "node1".to_owned(),
        target: "node2".to_owned(),
        pause_ms: Some(pause_ms),
        guest_wake_ms: Some(20.0),
        network_added_ms: Some(network_added_ms),
        to_vm_lost,
        tcp_stall_ms: Some(pause_ms + network_added_ms + 30.0),
        tcp_added_ms: Some(network_added_ms + 10.0),
        activated_ms: Some(1.5),
        ..Figures::default()
    }
}

/// On shared switches.
pub(super) fn run(strategy: Strategy, figures: Figures) -> Run {
    Run {
        strategy,
        topology: Topology::Shared,
        number: 1,
        measured: Ok(figures),
    }
}

/// Three migrations of segue and three of a peer, in both topologies.
pub(super) fn runs() -> Vec<Run> {
    let mut runs = Vec::new();
    for topology in [Topology::Routed, Topology::Shared] {
        for number in 1..=3 {
            let shift = f64::from(u32::try_from(number).unwrap_or_default());
            for (strategy, added, lost) in [
                (Strategy::OvnKubernetes, 320.0, 410),
                (Strategy::Segue, 0.5, 1),
            ] {
                runs.push(Run {
                    topology,
                    number,
                    ..run(strategy, figures(80.0 + shift, added + shift, lost))
                });
            }
        }
    }
    runs
}

/// A migration packet by packet: a pause of 40 ms, of which what came in the first `shut_ms` is lost, and what came last
/// comes twice.
pub(super) fn picture(strategy: Strategy, shut_ms: u32, twice: u32) -> Picture {
    let every = |range: std::ops::Range<i32>| range.map(f64::from);
    let sent: Vec<f64> = every(-50..120).collect();
    let shut = f64::from(shut_ms);
    let lost: Vec<f64> = every(0..120).filter(|at| *at < shut).collect();
    let queued = every(0..40)
        .filter(|at| *at >= shut)
        .map(|at| 45.0 + at / 100.0);
    let delivered = every(-50..0).chain(queued).chain(every(46..120));
    let way = |delivered: Vec<f64>, lost: Vec<f64>, twice: Vec<f64>| Way {
        sent: sent.clone(),
        delivered,
        lost,
        twice,
    };
    let own: Vec<f64> = every(-50..0).chain(every(45..120)).collect();
    Picture {
        opened_ms: Some(0.9),
        activated_ms: Some(12.0),
        resumed_ms: Some(40.0),
        flipped_ms: (strategy == Strategy::OvnKubernetes).then_some(90.0),
        to_vm: way(
            delivered.filter(|at| *at < 0.0 || *at >= shut).collect(),
            lost,
            (0..twice).map(|at| 60.0 + f64::from(at)).collect(),
        ),
        from_vm: Way {
            sent: own.clone(),
            delivered: own,
            ..Way::default()
        },
        until_ms: 120.0,
        ..Picture::empty(strategy, Topology::Shared)
    }
}
