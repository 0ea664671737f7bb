//! Which `HandoverPolicy` applies to a VM, and what it says.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use handover::{Deadlines, FlipPolicy, FlipTiming, GatePolicy, Mark, OnTimeout, Route};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::api::{
    FlipOn, GateTimeout, HandoverPolicy, LabelExpression, LabelOperator, PolicyGate, RoutingMode,
    VmSelector,
};

use crate::observe::Patience;
use crate::ovn::{PortRow, View, is_counterpart};

/// The longest time, in seconds, that a policy can ask for, and egress can be kept for. The API server
/// checks it too, unless it is of before the check.
pub(crate) const LONGEST: f64 = 86_400.0;
/// How many seconds a gate can take: less than virt-handler's own 30.
const GATE_SECONDS: std::ops::RangeInclusive<u64> = 1..=25;

/// How handovers are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// How long to wait for what.
    pub(crate) deadlines: Deadlines,
    /// What makes traffic follow a guest.
    pub(crate) mode: RoutingMode,
    /// When it does.
    pub(crate) flip: FlipPolicy,
    /// How long a migration waits for its network, and what then.
    pub(crate) gate: GatePolicy,
}

/// A policy, read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Policy {
    meta: ObjectMeta,
    namespaces: BTreeSet<String>,
    selector: VmSelector,
    routing: Asked,
}

/// What a policy asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Asked {
    mode: Option<RoutingMode>,
    timing: Option<FlipTiming>,
    keep_egress: Option<Duration>,
    peers: Option<Duration>,
    release: Option<Duration>,
    establish: Option<Duration>,
    gate_deadline: Option<Duration>,
    on_timeout: Option<OnTimeout>,
}

// === impl Settings ===

impl Settings {
    /// How long to wait for what.
    pub(crate) fn patience(&self, pod_gone_grace: Duration) -> Patience {
        Patience {
            deadlines: self.deadlines,
            pod_gone_grace,
        }
    }

    /// These, less a mode that comes too late: a handover under way is finished as it was begun.
    ///
    /// A pair of ports is of static routes; ports that two chassis have while the VM's addresses are
    /// in place sets are of those.
    #[must_use]
    pub(crate) fn held_to(mut self, view: &View) -> Self {
        let mut routes = view.places.routes.iter();
        let placed = routes.any(|route| !route.leads_to.is_empty());
        match begun(&view.ports, placed) {
            Some(RoutingMode::StaticRoutes) => {
                self.mode = RoutingMode::StaticRoutes;
                self.flip.keep_egress = Duration::ZERO;
            }
            Some(RoutingMode::AddressSets) => self.mode = RoutingMode::AddressSets,
            None => {}
        }
        self
    }

    /// The routes that are to follow the guest, with the chassis that they can lead to.
    pub(crate) fn routes<'a>(&self, view: &'a View) -> (&'a [Route], &'a BTreeSet<String>) {
        match self.mode {
            RoutingMode::AddressSets => (&view.places.routes, &view.places.gateways),
            RoutingMode::StaticRoutes => (&view.statics.routes, &view.statics.gateways),
        }
    }
}

/// The mode that a handover under way was begun in, as far as its marks tell.
fn begun(ports: &[PortRow], placed: bool) -> Option<RoutingMode> {
    let mut marked = ports
        .iter()
        .filter(|row| row.external_ids.contains_key(Mark::OWNER))
        .peekable();
    marked.peek()?;
    if marked.any(is_counterpart) {
        return Some(RoutingMode::StaticRoutes);
    }
    placed.then_some(RoutingMode::AddressSets)
}

// === impl Policy ===

impl TryFrom<HandoverPolicy> for Policy {
    type Error = String;

    /// What contradicts itself and what is out of range is refused here as the API server's validation
    /// does: the CRD may be an older one. How many there may be of something is the API's alone to say.
    fn try_from(policy: HandoverPolicy) -> Result<Self, String> {
        let spec = policy.spec;
        let routing = spec.routing.unwrap_or_default();
        let deadlines = spec.deadlines.unwrap_or_default();
        let gate = spec.gate.unwrap_or_default();
        #[expect(
            clippy::cast_precision_loss,
            reason = "a number of seconds that loses precision is refused for its size"
        )]
        let keep = routing.keep_egress_seconds.map(|seconds| seconds as f64);
        let asked = Asked {
            mode: routing.mode,
            timing: routing.flip.map(FlipTiming::from),
            keep_egress: seconds("routing.keepEgressSeconds", keep)?,
            peers: seconds("deadlines.peersSeconds", deadlines.peers_seconds)?,
            release: seconds("deadlines.releaseSeconds", deadlines.release_seconds)?,
            establish: seconds("deadlines.establishSeconds", deadlines.establish_seconds)?,
            gate_deadline: gate_deadline(gate)?,
            on_timeout: gate.on_timeout.map(OnTimeout::from),
        };
        let keeps = asked.keep_egress.is_some_and(|keep| !keep.is_zero());
        if keeps && asked.mode == Some(RoutingMode::StaticRoutes) {
            return Err("spec.routing: only AddressSets can keep egress".into());
        }
        if keeps && asked.timing == Some(FlipTiming::OnPause) {
            return Err("spec.routing: egress that is kept cannot flip on the pause".into());
        }
        let selector = spec.vm_selector.unwrap_or_default();
        if let Some(wrong) = selector.match_expressions.iter().find(|e| !is_whole(e)) {
            return Err(format!(
                "spec.vmSelector: {} {:?} with {} values",
                wrong.key,
                wrong.operator,
                wrong.values.len()
            ));
        }
        Ok(Self {
            meta: policy.metadata,
            namespaces: spec.namespaces.into_iter().collect(),
            selector,
            routing: asked,
        })
    }
}

impl Policy {
    pub(crate) fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    pub(crate) fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }

    /// Whether it says anything of routes.
    pub(crate) fn asks_for_routing(&self) -> bool {
        let asked = &self.routing;
        asked.mode.is_some() || asked.timing.is_some() || asked.keep_egress.is_some()
    }

    /// Whether it is for a VM.
    pub(crate) fn selects(&self, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        let named = self.namespaces.is_empty() || self.namespaces.contains(namespace);
        let mut wanted = self.selector.match_labels.iter();
        named
            && wanted.all(|(key, value)| labels.get(key) == Some(value))
            && self
                .selector
                .match_expressions
                .iter()
                .all(|expression| holds(expression, labels))
    }

    /// What orders policies: the greatest that selects a VM applies.
    pub(crate) fn precedence(&self) -> impl Ord + '_ {
        let labels = self.selector.match_labels.len() + self.selector.match_expressions.len();
        (
            labels > 0,
            !self.namespaces.is_empty(),
            labels,
            Reverse(self.name()),
        )
    }

    /// The defaults with what the policy says instead.
    pub(crate) fn apply(&self, defaults: Settings) -> Settings {
        let asked = &self.routing;
        let mode = asked.mode.unwrap_or(defaults.mode);
        let keep_egress = asked.keep_egress.unwrap_or(defaults.flip.keep_egress);
        Settings {
            deadlines: Deadlines {
                peers: asked.peers.unwrap_or(defaults.deadlines.peers),
                release: asked.release.unwrap_or(defaults.deadlines.release),
                establish: asked.establish.unwrap_or(defaults.deadlines.establish),
            },
            mode,
            flip: FlipPolicy {
                timing: asked.timing.unwrap_or(defaults.flip.timing),
                keep_egress: match mode {
                    RoutingMode::AddressSets => keep_egress,
                    RoutingMode::StaticRoutes => Duration::ZERO,
                },
            },
            gate: GatePolicy {
                deadline: asked.gate_deadline.unwrap_or(defaults.gate.deadline),
                on_timeout: asked.on_timeout.unwrap_or(defaults.gate.on_timeout),
            },
        }
    }
}

impl From<FlipOn> for FlipTiming {
    fn from(flip: FlipOn) -> Self {
        match flip {
            FlipOn::OnResume => Self::OnResume,
            FlipOn::OnPause => Self::OnPause,
        }
    }
}

impl From<GateTimeout> for OnTimeout {
    fn from(timeout: GateTimeout) -> Self {
        match timeout {
            GateTimeout::Ignore => Self::Ignore,
            GateTimeout::Fail => Self::Fail,
        }
    }
}

fn gate_deadline(gate: PolicyGate) -> Result<Option<Duration>, String> {
    let Some(seconds) = gate.deadline_seconds else {
        return Ok(None);
    };
    let fits = |seconds: &u64| GATE_SECONDS.contains(seconds);
    let whole = u64::try_from(seconds).ok().filter(fits);
    let (first, last) = (GATE_SECONDS.start(), GATE_SECONDS.end());
    let wrong = || format!("spec.gate.deadlineSeconds is {seconds}; it can be {first} to {last}");
    whole.map(Duration::from_secs).map(Some).ok_or_else(wrong)
}

fn seconds(field: &str, seconds: Option<f64>) -> Result<Option<Duration>, String> {
    let Some(seconds) = seconds else {
        return Ok(None);
    };
    let duration = Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|_| seconds <= LONGEST);
    let wrong = || format!("spec.{field} is {seconds}; it can be 0 to {LONGEST}");
    duration.map(Some).ok_or_else(wrong)
}

fn is_whole(expression: &LabelExpression) -> bool {
    let needs = matches!(
        expression.operator,
        LabelOperator::In | LabelOperator::NotIn
    );
    needs != expression.values.is_empty()
}

fn holds(expression: &LabelExpression, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&expression.key);
    let named = value.is_some_and(|value| expression.values.contains(value));
    match expression.operator {
        LabelOperator::In => named,
        LabelOperator::NotIn => !named,
        LabelOperator::Exists => value.is_some(),
        LabelOperator::DoesNotExist => value.is_none(),
    }
}

#[cfg(test)]
mod tests;
