"""``hvdlm verify``: runs the first steps of a script on one worker and on several, and names what differs and why."""
