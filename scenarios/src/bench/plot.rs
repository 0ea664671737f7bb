//! todo
use super::Results;
use anyhow::Result;
/// todo
pub fn plot(_: &Results) -> Result<String> {
    Ok(String::new())
}
