//! What must hold at every step, and whenever everything has caught up.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use super::{Migration, Stage, World};
use crate::{
    Decision, FlipTiming, Observed, PortConfig, PortName, RouteWrite, Step, Write, decide,
};

/// The same observation with the write in effect must not ask for that write again.
pub(super) fn idempotence(observed: &Observed, decision: &Decision) {
    let Some(write) = &decision.write else {
        return;
    };
    assert!(!write.ports.is_empty(), "an empty write: {decision:?}");
    assert_eq!(write.step == Step::Flip, !write.routes.is_empty());
    let mut after = observed.clone();
    for port in &mut after.ports {
        if let Some(write) = write.ports.iter().find(|write| write.port == port.name) {
            if decision.write.as_ref().map(|write| write.step) == Some(Step::Flip) {
                assert_eq!(port.config, write.config, "a flip's ports are guards");
            } else {
                assert_ne!(port.config, write.config, "a write that changes nothing");
            }
            port.config = write.config.clone();
        }
    }
    for route in &mut after.routes {
        if let Some(write) = write.routes.iter().find(|write| write.route == route.key) {
            let to: BTreeSet<_> = write.to.iter().cloned().collect();
            assert_ne!(route.leads_to, to, "a write that changes nothing");
            route.leads_to = to;
        }
    }
    if write.raise_nb_cfg_from.is_some() {
        after.barrier.nb_cfg += 1;
    }
    let again = decide(&after).write;
    assert_ne!(
        again.as_ref().map(|write| write.step),
        Some(write.step),
        "the step repeats itself"
    );
}

impl World {
    pub(super) fn check(&self, migration: &Migration, write: &Write) {
        self.check_fencing(migration, write);
        for port in write.ports.iter().filter(|_| write.step != Step::Flip) {
            self.check_reach(&port.port, &port.config);
        }
        for route in &write.routes {
            self.check_flip(route);
        }
    }

    /// A write never asks for a place where the guest is not, as long as the controller has heard
    /// which migration is the current one: how far that one has come since, it may well not know. Nor
    /// may it know what the instance says, while the Southbound shows where the guest is.
    fn check_reach(&self, port: &PortName, config: &PortConfig) {
        let (Some(guest), Some(requested)) = (self.guest(), config.requested_chassis.as_deref())
        else {
            return;
        };
        let shown = &self.controller.south.bindings[port];
        let is_shown = shown.is_claimed_by(guest) && self.south.bindings[port] == *shown;
        if !self.has_heard() || !(self.sees_instance() || is_shown) {
            return;
        }
        // Of a guest that is on its way the source is asked for, as long as nobody says more.
        let said = &self.chassis[self.instance().node];
        let fits = |text: &str| guest.is_named_by(text) || said.is_named_by(text);
        assert!(
            requested.is_empty() || requested.split(',').any(fits),
            "a write requests {requested:?} while the guest runs on {guest}"
        );
    }

    /// Routes lead to where the guest is, or, on the pause where the policy says so, to where it is
    /// about to be. One that led nowhere may be placed by what the controller knew last.
    fn check_flip(&self, write: &RouteWrite) {
        let mut begun = self.migrations.iter().filter(|migration| migration.begun);
        let current = begun.next_back().filter(|_| self.has_heard());
        let (Some(current), Some(guest)) = (current, self.guest()) else {
            return;
        };
        let ahead = self.flip.timing == FlipTiming::OnPause && current.stage >= Stage::Paused;
        let target = &self.chassis[current.target].name;
        assert!(
            write.to.as_ref() == Some(&guest.name)
                || write.from.is_empty()
                || !self.sees_instance()
                || (ahead && write.to.as_ref() == Some(target)),
            "{write:?} while the guest runs on {guest} in {current:?}",
        );
    }

    fn check_fencing(&self, migration: &Migration, write: &Write) {
        for write in &write.ports {
            let mark = self.north.ports[&write.port].mark.as_ref();
            assert!(
                mark.is_none_or(|mark| mark.epoch.0 <= migration.number),
                "migration {} wrote over {mark:?}",
                migration.number
            );
        }
    }

    /// Everything catches up but the migration, within a second: by then the guest has its network
    /// on every port, wherever it is.
    pub(super) fn guest_is_reachable(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..10 {
            self.catch_up();
            drop(self.act(true));
            self.pass(Duration::from_millis(100));
        }
        self.catch_up();
        let Some(guest) = self.guest().filter(|_| self.is_told()) else {
            return Ok(());
        };
        for name in self.north.ports.keys() {
            prop_assert!(
                self.south.reaches(name, guest),
                "{} is not open on {}: {:?}, {:?}, {:?}",
                name,
                guest,
                self.north.ports[name],
                self.south,
                self.migrations
            );
        }
        Ok(())
    }

    pub(super) fn is_on_target_of(&self, migration: &Migration) -> bool {
        self.guest() == Some(&self.chassis[migration.target])
    }

    /// Whether anybody has said where the guest runs.
    fn is_told(&self) -> bool {
        let Some(position) = self.in_flight() else {
            return true;
        };
        let migration = &self.migrations[position];
        match migration.stage {
            // Between its hosts it runs nowhere.
            Stage::Paused => false,
            Stage::Resumed => {
                let heard = self.agents && self.is_prepared(migration.number);
                migration.fails || heard
            }
            _ => true,
        }
    }

    /// Every route leads where the guest runs, and there alone, if a route can lead there.
    pub(super) fn routes_follow(&self) -> Result<(), TestCaseError> {
        let Some(guest) = self.guest().map(|guest| &guest.name) else {
            return Ok(());
        };
        let only = BTreeSet::from([guest.clone()]);
        for (key, leads_to) in &self.north.routes {
            prop_assert!(
                *leads_to == only || !self.gateways.contains(guest),
                "{} leads to {:?}, the guest runs on {}",
                key,
                leads_to,
                guest
            );
        }
        Ok(())
    }
}
