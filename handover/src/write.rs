//! What a decision asks to be written, with the guards that make it safe to write.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{Epoch, Mark, MigrationUid, PortConfig, PortName, RouteWrite};

/// Which step of the protocol a write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Step {
    /// T1: both chassis are requested, the target waits behind the activation strategy.
    Arm,
    /// The target claimed every port: `nb_cfg` is raised, and what the chassis make of it tells
    /// when they have all followed.
    RaiseBarrier,
    /// The target lost a port again: what was proved of it no longer holds.
    DropBarrier,
    /// The guest runs on the target behind a port that is shut, or nothing will open it: the
    /// activation strategy goes.
    Open,
    /// T2, or its mirror image of a roll-back: the routes lead to where the guest is.
    Flip,
    /// T3, or its mirror image of a roll-back: one chassis is requested, no strategy is left.
    Settle,
    /// The marks go; what was set before comes back.
    Release,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One transaction: every row or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Which step this is.
    pub step: Step,
    /// The ports' rows, each with what it must look like before and what it will look like after. A
    /// [flip](Step::Flip) changes none of them: there they are guards alone.
    pub ports: Vec<PortWrite>,
    /// The routes that change.
    pub routes: Vec<RouteWrite>,
    /// Raise `NB_Global.nb_cfg` by one from exactly this value, in the same transaction.
    pub raise_nb_cfg_from: Option<i64>,
}

/// A change to one Logical_Switch_Port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortWrite {
    /// The port.
    pub port: PortName,
    /// What the row must still say for the write to be made.
    pub expected: Expected,
    /// What segue's part of the row will say. Everything else in it stays as it is.
    pub config: PortConfig,
}

/// The values that a write was decided on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// `options:requested-chassis`.
    pub requested_chassis: Option<String>,
    /// `options:activation-strategy`.
    pub activation_strategy: Option<String>,
    /// Migration and epoch of the mark; `None` where the row bears none.
    pub owner: Option<(MigrationUid, Epoch)>,
}

impl Expected {
    /// The row exactly as it is.
    pub fn of(config: &PortConfig) -> Self {
        Self {
            requested_chassis: config.requested_chassis.clone(),
            activation_strategy: config.activation_strategy.clone(),
            owner: config.mark.as_ref().map(owner),
        }
    }
}

fn owner(mark: &Mark) -> (MigrationUid, Epoch) {
    (mark.migration.clone(), mark.epoch)
}

/// Why a row does not take a write.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The row belongs to a newer handover.
    #[error("port {port} belongs to epoch {theirs}, this write is of epoch {ours}")]
    Fenced {
        /// The port.
        port: PortName,
        /// The epoch on the row.
        theirs: Epoch,
        /// The epoch of the write, or of the mark it clears.
        ours: Epoch,
    },
    /// The row is not what the write was decided on.
    #[error("port {port} changed since the decision: {what}")]
    Changed {
        /// The port.
        port: PortName,
        /// Which value, with what was expected and what was found.
        what: String,
    },
}

impl PortWrite {
    /// Whether the row as it is now takes this write: what the guards of the transaction check in
    /// the database, said in one place.
    ///
    /// # Errors
    ///
    /// [`Refusal::Fenced`] for a write of an older epoch, [`Refusal::Changed`] for one that was
    /// decided on other values.
    pub fn check(&self, now: &PortConfig) -> Result<(), Refusal> {
        let ours = self
            .config
            .mark
            .as_ref()
            .map(|mark| mark.epoch)
            .or_else(|| self.expected.owner.as_ref().map(|(_, epoch)| *epoch))
            .unwrap_or_default();
        if let Some(mark) = &now.mark
            && mark.epoch > ours
        {
            return Err(Refusal::Fenced {
                port: self.port.clone(),
                theirs: mark.epoch,
                ours,
            });
        }
        let found = Expected::of(now);
        let changed = |what: String| {
            Err(Refusal::Changed {
                port: self.port.clone(),
                what,
            })
        };
        if found.requested_chassis != self.expected.requested_chassis {
            return changed(format!(
                "requested-chassis was {:?}, is {:?}",
                self.expected.requested_chassis, found.requested_chassis
            ));
        }
        if found.activation_strategy != self.expected.activation_strategy {
            return changed(format!(
                "activation-strategy was {:?}, is {:?}",
                self.expected.activation_strategy, found.activation_strategy
            ));
        }
        if found.owner != self.expected.owner {
            return changed(format!(
                "its mark was {:?}, is {:?}",
                self.expected.owner, found.owner
            ));
        }
        Ok(())
    }
}
