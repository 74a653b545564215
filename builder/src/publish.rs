//! To come.

use anyhow::Result;
use clap::Args;
use oscontainer_program::options::Global;

#[derive(Debug, Clone, Args)]
pub struct PublishArgs {}

pub fn main(_args: PublishArgs, _global: &Global) -> Result<()> {
    anyhow::bail!("to come")
}
