//! The record of one handover, as it is worked on.

use std::sync::Arc;

use handover::{Decision, Mark, Phase, PortName, Step, VmName, Waiting, Write};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;

use super::news::News;
use crate::api::{
    Condition, ConditionStatus, ConditionType, Handover, HandoverSpec, HandoverStatus,
    MigrationReference, Moment, Place, TimelineStep, VmReference,
};
use crate::kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration};
use crate::observe::{Ending, Incompatible, Observation};

/// A handover's record: what the API server has of it, and what it should have.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) namespace: String,
    /// Name of the Handover, which is its migration's.
    pub(crate) name: String,
    pub(crate) spec: HandoverSpec,
    pub(crate) status: HandoverStatus,
    /// As the API server has it.
    pub(crate) stored: Option<Arc<Handover>>,
    /// The migration, while it exists.
    pub(crate) migration: Option<Arc<VirtualMachineInstanceMigration>>,
    /// What is to be told once the record is stored.
    pub(crate) news: Vec<News>,
    /// Nothing but a mark is left of the migration: there is nothing to keep a record of it on.
    pub(crate) orphan: bool,
}

impl Record {
    /// The record of a migration that has none.
    pub(crate) fn new(
        migration: &Arc<VirtualMachineInstanceMigration>,
        vm: VmReference,
        uid: String,
        epoch: i64,
    ) -> Self {
        let meta = &migration.metadata;
        let name = meta.name.clone().unwrap_or_default();
        Self {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: name.clone(),
            spec: HandoverSpec {
                vm,
                migration: MigrationReference { name, uid },
                epoch,
                source: None,
                target: None,
                ports: Vec::new(),
            },
            status: HandoverStatus::default(),
            stored: None,
            migration: Some(migration.clone()),
            news: Vec::new(),
            orphan: false,
        }
    }

    /// The record that the API server has.
    pub(crate) fn of(
        handover: &Arc<Handover>,
        migration: Option<&Arc<VirtualMachineInstanceMigration>>,
    ) -> Self {
        let meta = &handover.metadata;
        Self {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            spec: handover.spec.clone(),
            status: handover.status.clone().unwrap_or_default(),
            stored: Some(handover.clone()),
            migration: migration.cloned(),
            news: Vec::new(),
            orphan: false,
        }
    }

    /// A record made of the mark that a vanished migration left behind. Which nodes its chassis were
    /// on is only known of the one where the VM is now.
    pub(crate) fn of_orphan(
        mark: &Mark,
        namespace: &str,
        vm: String,
        here: Option<(&str, &str)>,
    ) -> Self {
        let place = |chassis: &str| {
            let node = here.filter(|(_, here)| *here == chassis);
            Place {
                node: node
                    .map_or_else(|| format!("chassis {chassis}"), |(node, _)| node.to_owned()),
                chassis: Some(chassis.to_owned()).filter(|chassis| !chassis.is_empty()),
                ..Place::default()
            }
        };
        let uid = mark.migration.to_string();
        Self {
            namespace: namespace.to_owned(),
            name: uid.clone(),
            spec: HandoverSpec {
                vm: VmReference {
                    name: vm,
                    uid: None,
                },
                migration: MigrationReference {
                    name: String::new(),
                    uid,
                },
                epoch: i64::try_from(mark.epoch.0).unwrap_or(i64::MAX),
                source: Some(place(&mark.source)),
                target: Some(place(&mark.target)),
                ports: Vec::new(),
            },
            status: HandoverStatus::default(),
            stored: None,
            migration: None,
            news: Vec::new(),
            orphan: true,
        }
    }

    /// UID of the migration.
    pub(crate) fn uid(&self) -> &str {
        &self.spec.migration.uid
    }

    /// Whether it is about this VM.
    pub(crate) fn is_of(&self, vm: &VmName) -> bool {
        self.namespace == vm.namespace && self.spec.vm.name == vm.name
    }

    /// Whether the spec must be written.
    pub(crate) fn is_spec_stale(&self) -> bool {
        self.stored
            .as_ref()
            .is_none_or(|stored| stored.spec != self.spec)
    }

    /// Whether the status must be written.
    pub(crate) fn is_status_stale(&self) -> bool {
        let stored = self
            .stored
            .as_ref()
            .and_then(|stored| stored.status.as_ref());
        stored.is_none_or(|stored| *stored != self.status)
    }

    /// What makes the migration own the Handover; of a migration that is gone, what did.
    pub(crate) fn owners(&self) -> Vec<OwnerReference> {
        let stored = || self.stored.as_ref()?.metadata.owner_references.clone();
        let current = self.migration.as_ref().and_then(|migration| {
            Some(vec![OwnerReference {
                // Nobody has to wait for a record to go before a migration can.
                block_owner_deletion: None,
                ..migration.controller_owner_ref(&())?
            }])
        });
        current.or_else(stored).unwrap_or_default()
    }

    /// Takes note of a step that was taken.
    pub(crate) fn stepped(&mut self, write: &Write, now: Moment) {
        if self.cannot_write() {
            self.degrade(None, now);
        }
        let step = match write.step {
            Step::Arm => TimelineStep::Armed,
            Step::RaiseBarrier => TimelineStep::BarrierRaised,
            Step::DropBarrier => TimelineStep::BarrierDropped,
            Step::Open => TimelineStep::StrategyRemoved,
            Step::Flip => {
                let back = self.leads_to_source(write);
                // A first place where the guest still is makes nothing follow anybody.
                if !back || write.routes.iter().any(|route| !route.from.is_empty()) {
                    self.news.push(News::flipped(self, write, back));
                }
                if back {
                    return;
                }
                TimelineStep::Flipped
            }
            Step::Settle => TimelineStep::Settled,
            Step::Release => TimelineStep::Released,
        };
        self.status.take_step(step, now);
    }

    fn leads_to_source(&self, write: &Write) -> bool {
        let source = self.spec.source.as_ref();
        let source = source.and_then(|source| source.chassis.as_ref());
        write.routes.iter().all(|route| route.to.as_ref() == source)
    }

    /// Takes note of a write that the database did not take.
    pub(crate) fn not_written(&mut self, step: Step, why: &str, now: Moment) {
        let message = format!("{step} could not be written and is tried again: {why}");
        self.degrade(Some((CANNOT_WRITE, message)), now);
    }

    fn cannot_write(&self) -> bool {
        let degraded = Condition::find(&self.status.conditions, ConditionType::Degraded);
        degraded.is_some_and(|degraded| degraded.reason == CANNOT_WRITE)
    }

    /// Brings the status in line with a decision.
    pub(crate) fn reflect(&mut self, decision: &Decision, seen: &Observation, now: Moment) {
        self.status.waiting_for = decision
            .waiting
            .as_ref()
            .map(|waiting| word(waiting).to_owned());
        self.status.message = decision.waiting.as_ref().map(|waiting| match waiting {
            Waiting::Source | Waiting::Target if seen.unmapped.is_some() => {
                seen.unmapped.clone().unwrap_or_default()
            }
            waiting => waiting.to_string(),
        });
        self.status.failure_reason = failure(decision, seen);
        if decision.phase.is_final() && !decision.superseded {
            self.find_end(seen, now);
        }
        self.enter(decision.phase, now);
        self.judge(decision, seen, now);
    }

    /// Records that the ports were settled and released, where that is seen on them and a crash kept it
    /// from the record. The network's owner can have done either.
    fn find_end(&mut self, seen: &Observation, now: Moment) {
        let steps = [TimelineStep::Armed, TimelineStep::Settled];
        let touched = steps.iter().any(|step| self.status.step(*step).is_some());
        let mut ports = seen.observed.ports.iter();
        let is_let_go = ports.all(|port| {
            let requested = port.config.requested_chassis.as_deref();
            port.config.mark.is_none() && !requested.is_some_and(|list| list.contains(','))
        });
        if touched && is_let_go && seen.ending != Ending::Gone {
            self.status.take_step_once(TimelineStep::Settled, now);
            self.status.take_step_once(TimelineStep::Released, now);
        }
    }

    fn enter(&mut self, phase: Phase, now: Moment) {
        let before = self.status.phase_since.map(|_| self.status.phase);
        if before == Some(phase) {
            return;
        }
        let lasted = self
            .status
            .phase_since
            .map(|since| now.seconds_since(since));
        self.status.phase = phase;
        self.status.phase_since = Some(now);
        let step = match phase {
            Phase::Ready => Some(TimelineStep::Ready),
            Phase::Succeeded => Some(TimelineStep::Succeeded),
            Phase::RolledBack => Some(TimelineStep::RolledBack),
            Phase::Failed => Some(TimelineStep::Failed),
            _ => None,
        };
        if let Some(step) = step {
            self.status.take_step(step, now);
        }
        self.news.push(News::phase(self, before.zip(lasted)));
    }

    fn judge(&mut self, decision: &Decision, seen: &Observation, now: Moment) {
        let message = self.status.message.clone().unwrap_or_default();
        let waiting = self.status.waiting_for.clone();
        let phase = decision.phase;
        let prepared = match phase {
            Phase::Ready => Some((ConditionStatus::True, phase.to_string())),
            Phase::Pending | Phase::Preparing => Some((
                ConditionStatus::False,
                waiting.unwrap_or_else(|| phase.to_string()),
            )),
            // What was proved before the guest moved is history; what was not stays unproved.
            _ => self.was_prepared(),
        };
        if let Some((status, reason)) = prepared {
            let waits = matches!(phase, Phase::Ready | Phase::Pending | Phase::Preparing);
            let said = match (waits, status) {
                (true, _) => message.clone(),
                (false, ConditionStatus::True) => "it was before the guest moved".to_owned(),
                (false, _) => "it was not before the migration was over".to_owned(),
            };
            self.set(ConditionType::Prepared, status, &reason, said, now);
        }
        self.complete(now);
        let trouble = seen
            .damaged
            .first()
            .map(|(port, error)| {
                let message = format!(
                    "port {port} bears a mark that cannot be read and is left alone: {error}; \
                     restore the keys segue.io/*, or remove them all"
                );
                ("DamagedMark", message)
            })
            .or_else(|| Some(("PortsCannotMove", seen.obstacle.clone()?)))
            .or_else(|| match &decision.waiting {
                Some(
                    waiting @ (Waiting::ForeignRequest { .. } | Waiting::BoundElsewhere { .. }),
                ) => Some((word(waiting), message.clone())),
                _ if phase == Phase::Failed => Some((FAILED, message)),
                _ => None,
            });
        if trouble.is_none() && decision.write.is_some() && self.cannot_write() {
            // Until it is written, or need not be.
            return;
        }
        let trouble = trouble.or_else(|| left_out(decision));
        let hindered = || Some((ROUTES_STAY, seen.hindrance.clone()?));
        self.degrade(trouble.or_else(hindered), now);
    }

    /// What is said of a target once its guest has moved, or is not going to: what was so before.
    fn was_prepared(&self) -> Option<(ConditionStatus, String)> {
        let before = Condition::find(&self.status.conditions, ConditionType::Prepared)?;
        Some((before.status, before.reason.clone()))
    }

    fn complete(&mut self, now: Moment) {
        let phase = self.status.phase;
        let status = if phase.is_final() {
            ConditionStatus::True
        } else {
            ConditionStatus::False
        };
        let message = self.status.failure_reason.clone().unwrap_or_default();
        self.set(
            ConditionType::Complete,
            status,
            &phase.to_string(),
            message,
            now,
        );
    }

    /// Says what keeps the handover from acting, or that nothing does.
    pub(crate) fn degrade(&mut self, trouble: Option<(&str, String)>, now: Moment) {
        let before = Condition::find(&self.status.conditions, ConditionType::Degraded);
        let known = before.is_some_and(|before| before.status == ConditionStatus::True);
        // Routes that stay keep nothing else from going wrong.
        let only_stay = before.is_some_and(|before| before.reason == ROUTES_STAY);
        let Some((reason, message)) = trouble else {
            self.set(
                ConditionType::Degraded,
                ConditionStatus::False,
                "AsExpected",
                String::new(),
                now,
            );
            return;
        };
        // That the handover failed is told by the phase.
        let told = reason == FAILED;
        if !told && (!known || (only_stay && reason != ROUTES_STAY)) {
            self.news.push(News::trouble(message.clone()));
        }
        self.set(
            ConditionType::Degraded,
            ConditionStatus::True,
            reason,
            message,
            now,
        );
    }

    /// Says, once, before the migration begins, what the network cannot save.
    pub(crate) fn preflight(
        &mut self,
        vmi: &VirtualMachineInstance,
        found: Option<Incompatible>,
        now: Moment,
    ) {
        if Condition::find(&self.status.conditions, ConditionType::Compatible).is_some() {
            return;
        }
        self.spec.vm.uid.clone_from(&vmi.metadata.uid);
        let Some(Incompatible {
            certain,
            reason,
            message,
        }) = found
        else {
            self.set(
                ConditionType::Compatible,
                ConditionStatus::True,
                "Bridged",
                String::new(),
                now,
            );
            return;
        };
        let status = if certain {
            self.news.push(News::incompatible(message.clone()));
            ConditionStatus::False
        } else {
            ConditionStatus::Unknown
        };
        self.set(ConditionType::Compatible, status, reason, message, now);
    }

    fn set(
        &mut self,
        type_: ConditionType,
        status: ConditionStatus,
        reason: &str,
        message: String,
        now: Moment,
    ) {
        Condition::set(
            &mut self.status.conditions,
            type_,
            status,
            reason,
            message,
            now,
        );
    }
}

pub(super) const GUEST_GONE: &str = "the VM is gone";
/// Reason of a record whose port is not where the guest runs.
const FAILED: &str = "Failed";
/// Reason of a record whose write the database does not take.
const CANNOT_WRITE: &str = "CannotWrite";
/// Reason of a record whose routes cannot follow the guest.
const ROUTES_STAY: &str = "RoutesStay";
const SUPERSEDED: &str = "a newer migration of the VM has taken the ports over";

fn failure(decision: &Decision, seen: &Observation) -> Option<String> {
    if decision.superseded {
        return Some(SUPERSEDED.to_owned());
    }
    match (&decision.phase, &seen.ending) {
        (Phase::Failed, _) => {
            Some("the guest runs, and not all of its ports are where it is".into())
        }
        (_, Ending::Gone) => Some(GUEST_GONE.to_owned()),
        (_, Ending::On(handover::Side::Source)) => {
            let told = seen.failure.clone();
            Some(
                told.unwrap_or_else(|| {
                    "the migration did not succeed: KubeVirt gave no reason".into()
                }),
            )
        }
        (Phase::RollingBack, Ending::Running) => Some("the source resumed the guest".into()),
        _ => None,
    }
}

/// What is to be said of ports that take no part, once the others are prepared.
fn left_out(decision: &Decision) -> Option<(&'static str, String)> {
    let early = matches!(decision.phase, Phase::Pending | Phase::Preparing);
    if early || decision.left_out.is_empty() {
        return None;
    }
    let ports: Vec<_> = decision.left_out.iter().map(PortName::as_str).collect();
    let message = format!(
        "no chassis has an interface of {}, which the handover leaves out: delete what nobody uses, or \
         remove its external_ids:segue.io/vm",
        ports.join(", ")
    );
    Some(("PortsLeftOut", message))
}

/// A wait in one word, for the table and for programs.
fn word(waiting: &Waiting) -> &'static str {
    match waiting {
        Waiting::Ports => "Ports",
        Waiting::Source => "Source",
        Waiting::Target => "Target",
        Waiting::EarlierMigration => "EarlierMigration",
        Waiting::Interface => "Interface",
        Waiting::BoundElsewhere { .. } => "BoundElsewhere",
        Waiting::ForeignRequest { .. } => "ForeignRequest",
        Waiting::Claim { .. } => "Claim",
        Waiting::Barrier { .. } => "Barrier",
        Waiting::Peers => "Peers",
        Waiting::Guest => "Guest",
        Waiting::MigrationEnd => "MigrationEnd",
        Waiting::Outcome => "Outcome",
        Waiting::SourceRelease { .. } => "SourceRelease",
        Waiting::Binding { .. } => "Binding",
        Waiting::KeptEgress { .. } => "KeptEgress",
        Waiting::OtherPod { .. } => "OtherPod",
    }
}
