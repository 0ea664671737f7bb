//! Against Open vSwitch itself: its database and its switch, with ports that are no devices, as any user.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

mod openflow;
mod ports;
mod support;
