from medcot_utils.cli import main

main()
