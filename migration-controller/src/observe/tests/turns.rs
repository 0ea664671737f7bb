//! A guest that was paused and resumed on its source while its migration went on.

use super::*;
use SignalKind::{Paused, ResumedOnSource, ResumedOnTarget};
use SignalSource::{Activation, Libvirt, Qmp};

/// The second at which something was told.
fn at(second: u32) -> String {
    format!("2026-09-01T10:09:{second:02}Z")
}

impl World {
    /// An agent's word, by a stamp of its node's clock.
    fn hears(&mut self, kind: SignalKind, source: SignalSource, second: u32) {
        let seen = told(kind, source, &at(second));
        self.learned.signals.push(seen.clone());
        self.learned.turns.push(seen);
    }

    fn place(&mut self) -> GuestPlace {
        self.observe().observed.signals.guest()
    }

    fn signs(&self) -> Vec<(SignalKind, SignalSource, Moment)> {
        let signals = self.status.signals.iter();
        signals
            .map(|seen| (seen.kind, seen.source, seen.at))
            .collect()
    }
}

/// A person paused it, for which the target was opened, and resumed it.
fn resumed() -> World {
    let mut world = activated();
    world.hears(Paused, Qmp, 10);
    world.hears(ResumedOnSource, Qmp, 20);
    world.learned.opening = Some(opening(OpeningResult::Opened));
    world
}

#[test]
fn a_second_pause_is_recorded_beside_the_first_and_ends_the_resume() {
    let mut world = resumed();
    assert_eq!(world.place(), GuestPlace::BackOnSource);
    world.hears(Paused, Qmp, 40);
    assert_eq!(world.place(), GuestPlace::InTransit);
    assert_eq!(world.place(), GuestPlace::InTransit, "once more");
    let signs = world.signs();
    assert_eq!(
        signs,
        [
            (Paused, Qmp, moment(&at(10))),
            (ResumedOnSource, Qmp, moment(&at(20))),
            (Paused, Qmp, moment(&at(40))),
        ]
    );
    let first = Some(moment(&at(10)));
    assert_eq!(world.status.step(TimelineStep::Paused), first);

    // Another controller hears it all again, and takes what is long ago to be of now.
    world.learned.turns.clear();
    for seen in &mut world.learned.signals {
        seen.at = moment(NOW);
    }
    assert_eq!(world.place(), GuestPlace::InTransit);
    assert_eq!(world.signs(), signs);

    world.learned = Learned::default();
    world.learned.signals = vec![told(ResumedOnTarget, Libvirt, &at(41))];
    assert_eq!(world.place(), GuestPlace::Target);
}

#[test]
fn what_was_told_before_and_cannot_be_compared_ends_no_resume() {
    // By the source that told of it, and by one that was not heard then.
    for source in [Qmp, Libvirt] {
        let mut world = resumed();
        world.observe();
        let before = world.signs();
        world.learned = Learned::default();
        world.learned.signals = vec![told(Paused, source, NOW)];
        assert_eq!(world.place(), GuestPlace::BackOnSource);
        assert_eq!(world.signs(), before);
    }
}

#[test]
fn a_port_that_was_opened_for_an_earlier_pause_says_nothing_by_its_being_open() {
    let mut world = resumed();
    world.hears(Paused, Libvirt, 40);
    assert_eq!(world.place(), GuestPlace::InTransit);
    let is_activation = |&(_, source, _): &(_, SignalSource, _)| source == Activation;
    assert!(!world.signs().iter().any(is_activation));

    // Nobody opened this one, so it was the guest that did.
    let mut world = resumed();
    world.ports[0].activated.clear();
    world.learned.opening = None;
    world.hears(Paused, Libvirt, 40);
    assert_eq!(world.place(), GuestPlace::InTransit);
    world.ports = activated().ports;
    assert_eq!(world.place(), GuestPlace::Target);
}
