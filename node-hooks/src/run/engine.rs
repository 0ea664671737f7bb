//! One task that feeds the state machine and does what it says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use node_hooks_api::agent::{Arm, Disarm, HandoverId, to_agent};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::effects::Effects;
use crate::core::{Core, Input, Output};
use crate::ear::HeardFrame;
use crate::ovs::Interfaces;
use crate::signals::LifecycleEvent;
use crate::{hook, wire};

const TICK: Duration = Duration::from_secs(1);

/// Where inputs come from, the most urgent first; and hypervisors, of which there are many, not before the controller.
pub(super) struct Inputs {
    pub(super) said: mpsc::Receiver<wire::Event>,
    pub(super) lifecycle: mpsc::Receiver<LifecycleEvent>,
    pub(super) done: mpsc::UnboundedReceiver<Input>,
    pub(super) heard: mpsc::Receiver<HeardFrame>,
    pub(super) asked: mpsc::UnboundedReceiver<hook::Event>,
    pub(super) interfaces: watch::Receiver<Arc<Interfaces>>,
}

/// The state machine with its inputs and effects.
pub(super) struct Engine {
    core: Core,
    effects: Effects,
    inputs: Inputs,
    busy: watch::Sender<bool>,
    stop: CancellationToken,
    out: Vec<Output>,
}

impl Engine {
    pub(super) fn new(
        effects: Effects,
        inputs: Inputs,
        busy: watch::Sender<bool>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            core: Core::default(),
            effects,
            inputs,
            busy,
            stop,
            out: Vec::new(),
        }
    }

    /// Runs until it is stopped, or a part that it needs has ended.
    pub(super) async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let inputs = &mut self.inputs;
        let known = inputs.interfaces.borrow_and_update().clone();
        self.take(Input::Interfaces(known));
        loop {
            let inputs = &mut self.inputs;
            let input = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                event = inputs.said.recv() => match event {
                    Some(wire::Event::Up) => Input::Linked,
                    Some(wire::Event::Down) => Input::Unlinked,
                    Some(wire::Event::Said { message, received }) => {
                        Input::Command { message, received }
                    }
                    None => return,
                },
                event = inputs.lifecycle.recv() => match event {
                    Some(event) => Input::Lifecycle(event),
                    None => return,
                },
                // This end is held, too.
                Some(input) = inputs.done.recv() => input,
                Some(frame) = inputs.heard.recv() => Input::Heard(frame),
                Some(event) = inputs.asked.recv() => match event {
                    hook::Event::Asked { call, about } => Input::Asked { call, about },
                    hook::Event::Withdrawn { call } => Input::Withdrawn { call },
                },
                changed = inputs.interfaces.changed() => match changed {
                    Ok(()) => Input::Interfaces(inputs.interfaces.borrow_and_update().clone()),
                    Err(_) => return,
                },
                _ = tick.tick() => {
                    self.look();
                    Input::Tick
                }
            };
            self.take(input);
        }
    }

    /// What nobody tells by itself: interfaces that are gone, and counters.
    fn look(&mut self) {
        for interface in self.effects.deaf() {
            self.take(Input::Deaf { interface });
        }
        if self.core.is_busy() {
            let counted = self.inputs.interfaces.borrow().clone();
            self.take(Input::Interfaces(counted));
        }
    }

    fn take(&mut self, input: Input) {
        let what = said(&input);
        self.core.handle(input, Instant::now(), &mut self.out);
        for output in self.out.drain(..) {
            self.effects.carry_out(output);
        }
        let armed = self.core.armed_count();
        self.effects.armed(armed);
        self.busy
            .send_if_modified(|busy| std::mem::replace(busy, armed > 0) != (armed > 0));
        if let Some((what, id)) = what {
            let vm = format!("{}/{}", id.namespace, id.vm);
            tracing::info!(
                vm,
                migration = id.migration_uid,
                epoch = id.epoch,
                "told to {what}"
            );
        }
    }
}

/// What is worth a line for whoever follows a handover. An Open is not: nothing is to delay it, and
/// what came of it is.
fn said(input: &Input) -> Option<(&'static str, HandoverId)> {
    let Input::Command { message, .. } = input else {
        return None;
    };
    match message {
        to_agent::Message::Arm(Arm { id, .. }) => Some(("arm", id.clone()?)),
        to_agent::Message::Disarm(Disarm { id, .. }) => Some(("disarm", id.clone()?)),
        _ => None,
    }
}
