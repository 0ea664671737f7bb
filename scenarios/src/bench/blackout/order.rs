//! Who is next.

use crate::scenario::Strategy;

/// The strategies in the order of a round, from 0. Each is in it once.
///
/// A guest goes there and back by turns. With the same order in every round an even number of strategies would send each
/// strategy the same way for ever, so the order is turned from round to round; that of an odd number every other round, in
/// which the ways have changed by themselves. A strategy goes there as often as back, and follows others than before. The
/// one with a guest of its own is put in between, at another place each time.
pub(super) fn of_round(strategies: &[Strategy], round: usize) -> Vec<Strategy> {
    let (apart, mut order): (Vec<_>, Vec<_>) = strategies
        .iter()
        .partition(|strategy| has_a_guest_of_its_own(**strategy));
    let turns = if order.len().is_multiple_of(2) {
        round
    } else {
        round / 2
    };
    let by = turns.checked_rem(order.len()).unwrap_or_default();
    order.rotate_left(by);
    for strategy in apart {
        order.insert(round % (order.len() + 1), strategy);
    }
    order
}

fn has_a_guest_of_its_own(strategy: Strategy) -> bool {
    strategy == Strategy::OvnKubernetes
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    #[test]
    fn everybody_has_a_turn_in_every_round_and_goes_there_as_often_as_back() {
        for count in 1..=Strategy::ALL.len() {
            let strategies = &Strategy::ALL[..count];
            let mut there: BTreeMap<Strategy, i32> = BTreeMap::new();
            // How often each guest has moved.
            let mut moved = [0, 0];
            for round in 0..20 {
                let mut order = of_round(strategies, round);
                for strategy in &order {
                    let guest = &mut moved[usize::from(has_a_guest_of_its_own(*strategy))];
                    *there.entry(*strategy).or_default() += i32::from(*guest % 2 == 0);
                    *guest += 1;
                }
                order.sort_unstable();
                assert_eq!(order, strategies);
            }
            for (strategy, there) in there {
                assert_eq!(there, 10, "{strategy} of {count}");
            }
        }
    }

    #[test]
    fn nobody_always_follows_the_same() {
        let first: BTreeSet<_> = (0..16)
            .map(|round| of_round(&Strategy::ALL, round)[0])
            .collect();
        assert_eq!(first.len(), Strategy::ALL.len());
    }
}
