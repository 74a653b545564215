//! To come.

use anyhow::Result;
use clap::Args;
use oscontainer_program::options::Global;

#[derive(Debug, Clone, Args)]
pub struct EndpointArgs {}

pub fn main(_args: EndpointArgs, _global: &Global) -> Result<()> {
    anyhow::bail!("to come")
}
