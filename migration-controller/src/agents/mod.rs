//! The nodes' agents: what they are told, what they tell, and what is made of it at once.
//!
//! [`Board`](board::Board) is what is armed and what was heard, [`Desk`](gate::Desk) the questions at
//! the gate; both are free of I/O. [`Hub`] keeps them behind one lock, with a queue to every agent;
//! [`service`] and [`listen`] are the wire.
//!
//! # Guarantees
//!
//! * Nothing waits for an agent. What is for one goes into a bounded queue, and one whose queue is
//!   full is dropped.
//! * What an agent says counts only of handovers that its node is an end of, of their present epoch.
//! * A port is opened early on one condition: the handover was ready when the agent of its source
//!   told of the pause, and the pause was news then.
//! * Whatever an agent does or fails to do, the decisions see what they would see without it, and a
//!   few signals more.

mod armed;
mod board;
mod gate;
mod hub;
mod listen;
mod metrics;
mod opening;
mod service;
mod time;
mod tls;

pub(crate) use board::{Learned, Post, Standing};
pub(crate) use gate::{MigrationView, VmView};
pub(crate) use hub::{Front, Hub};
pub(crate) use listen::{Endpoint, listen};
pub(crate) use metrics::AgentMetrics;
pub(crate) use tls::Certificates;

#[cfg(test)]
pub(crate) mod tests;
