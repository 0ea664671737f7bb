//! Why routes cannot follow a guest.

use std::collections::BTreeSet;

use handover::{FlipPolicy, FlipTiming, Side};

use crate::api::RoutingMode;
use crate::observe::{Ending, Observation};
use crate::ovn::Places;
use crate::policy::Policy;

/// Why the routes of a guest that moves stay where they are, as a person can mend it; nothing where
/// they follow, or where there are none.
pub(super) fn hindrance(
    seen: &Observation,
    places: &Places,
    mode: RoutingMode,
    cluster_router: Option<&str>,
) -> Option<String> {
    let moves = match seen.ending {
        Ending::Running | Ending::On(Side::Target) | Ending::Elsewhere { .. } => true,
        Ending::On(Side::Source) | Ending::Gone => false,
    };
    if !moves {
        return None;
    }
    if mode == RoutingMode::StaticRoutes && cluster_router.is_none() {
        return Some(
            "no route follows the guest: the policy asks for StaticRoutes, and the controller runs \
             without --cluster-router"
                .to_owned(),
        );
    }
    let (observed, target) = (&seen.observed, seen.observed.target.as_ref()?);
    if observed.routes.is_empty() || observed.gateways.contains(&target.name) {
        return None;
    }
    let led: BTreeSet<_> = observed
        .routes
        .iter()
        .flat_map(|route| route.leads_to.iter().map(String::as_str))
        .collect();
    let led = led.into_iter().collect::<Vec<_>>().join(", ");
    let target = &target.name;
    Some(match mode {
        RoutingMode::AddressSets => {
            let lacking = places.not_carried_by(target).into_iter();
            let lacking: Vec<_> = lacking.map(crate::routed::Family::field).collect();
            let what = match led.as_str() {
                "" => "routes lead nowhere yet".to_owned(),
                led => format!("routes stay with the gateway of {led}"),
            };
            format!(
                "{what}: chassis {target} has no gateway for {}",
                lacking.join(", ")
            )
        }
        RoutingMode::StaticRoutes => format!(
            "static routes stay as they are, leading to {led:?}: no routed switch is for the node of chassis {target}; \
             name it in external_ids:segue.io/node of its switch"
        ),
    })
}

/// What a policy asks for in vain. `flip` is what it comes to with the controller's own settings.
pub(super) fn in_vain(
    policy: &Policy,
    flip: FlipPolicy,
    cluster_router: Option<&str>,
) -> Option<&'static str> {
    let ahead = flip.timing == FlipTiming::OnPause;
    if policy.asks_for_routing() && cluster_router.is_none() {
        Some(
            "what the policy says of routing has no effect: the controller runs without \
             --cluster-router (SEGUE_CLUSTER_ROUTER)",
        )
    } else if ahead && !flip.keep_egress.is_zero() {
        Some(
            "the flip does not go ahead on the pause, because egress is kept: one of both comes from \
             the controller's own settings (--flip, --keep-egress); say keepEgressSeconds: 0, or \
             flip: OnResume, in the policy",
        )
    } else {
        None
    }
}
