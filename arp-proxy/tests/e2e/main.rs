//! The program on real interfaces: a guest and a host, each a network namespace, between them a link.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

mod lifecycle;
mod ovs;
mod station;
mod support;
mod wire;
